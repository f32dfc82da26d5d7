"""What the plugin hands to sbatch is what SLURM does, and what scancel could not do is not taken for done."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import snakemake_executor_plugin_submitit as plugin
from snakemake_executor_plugin_submitit import ledger, slurm, status
from snakemake_executor_plugin_submitit.failures import NotReached
from snakemake_executor_plugin_submitit.job import Allocation
from snakemake_executor_plugin_submitit.resources import read
from snakemake_executor_plugin_submitit.work import Submission

UNREACHABLE = "Unable to contact slurm controller (connect failure)"
OVERRIDES = {"SBATCH_PARTITION": "other", "SBATCH_TIMELIMIT": "1", "SBATCH_SIGNAL": "TERM@1", "SBATCH_NO_REQUEUE": "1"}
OVERRIDES |= {"SBATCH_EXPORT": "ALL", "SBATCH_WAIT": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_MEM_PER_CPU": "1"}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder of commands that come before SLURM's own; sbatch there writes down its environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    command(folder, "srun", "exit 0")
    command(folder, "sbatch", f"env > {tmp_path}/environment; echo Submitted batch job 17")
    monkeypatch.setattr(slurm, "CANCEL_RETRY_SECONDS", (0, 0, 0))
    return folder


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def submission(folder: Path, job_id: str | None = None, **resources) -> Submission:
    record = ledger.new_record(rule="base", wildcards={}, job_id=job_id)
    return Submission(record, read("base", resources, 4), folder / "job", folder / "token")


def submit(cluster: slurm.SlurmCluster, folder: Path, **resources) -> set[str]:
    """Submit a job; the SBATCH_ variables that sbatch saw."""
    one = submission(folder, **resources)
    cluster.submit(Allocation("true", str(one.folder), str(folder), str(one.token_file)), one)
    assert one.job_id == "17"
    return {line.split("=")[0] for line in (folder / "environment").read_text().splitlines() if "SBATCH_" in line}


def test_no_variable_overrides_what_the_job_asks_for(tmp_path, commands, monkeypatch, caplog):
    for name, value in {**OVERRIDES, "SBATCH_ACCOUNT": "lab", "SBATCH_QOS": "long"}.items():
        monkeypatch.setenv(name, value)
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    for _ in range(2):
        seen = submit(cluster, tmp_path, slurm_partition="gpu", runtime=60, mem_mb=1000)
        assert seen == {"SBATCH_ACCOUNT", "SBATCH_QOS"}
    (said,) = caplog.messages
    assert all(name in said for name in OVERRIDES)
    assert os.environ["SBATCH_PARTITION"] == "other"  # only sbatch does not see it
    assert submit(cluster, tmp_path, slurm_account="mine", qos="short") == {
        "SBATCH_PARTITION",
        "SBATCH_TIMELIMIT",
        "SBATCH_MEM_PER_CPU",
    }
    assert "SBATCH_ACCOUNT, SBATCH_QOS" in caplog.messages[-1]


def test_a_stage_without_gpus_gets_none_from_the_environment(tmp_path, commands, monkeypatch):
    monkeypatch.setenv("SBATCH_GPUS", "2")
    monkeypatch.setenv("SBATCH_GRES", "gpu:2")
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    assert submit(cluster, tmp_path) == set()
    monkeypatch.setenv("SBATCH_GRES", "lustre:1")
    assert submit(cluster, tmp_path) == {"SBATCH_GRES"}


def test_jobs_for_another_cluster_are_refused_before_any_is_queued(monkeypatch):
    monkeypatch.setenv("SBATCH_CLUSTERS", "other")
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    with pytest.raises(ValueError, match=r"SBATCH_CLUSTERS = 'other': .* login node .* unset"):
        cluster.check("base", read("base", {}, 1))


ROW = "17|PENDING|{reason}|N/A||0|N/A|N/A|"


@pytest.mark.parametrize(
    ("partition", "reason", "waits"),
    [
        ("gpu,general", "PartitionTimeLimit", True),
        ("gpu,general", "InvalidAccount", False),
        ("gpu", "PartitionTimeLimit", False),
        (None, "PartitionTimeLimit", True),  # SBATCH_PARTITION names them
    ],
)
def test_what_keeps_a_job_out_of_one_of_its_partitions_is_no_reason_to_give_up(
    tmp_path, commands, monkeypatch, partition, reason, waits
):
    monkeypatch.setenv("SBATCH_PARTITION", "gpu,general")
    command(commands, "squeue", f"echo '{ROW.format(reason=reason)}'")
    command(commands, "sacct", "exit 1")
    one = submission(tmp_path, "17", **({"slurm_partition": partition} if partition else {}))
    seen = slurm.SlurmCluster(logging.getLogger("test")).observe([one])["17"]
    assert (seen.state, seen.reason) == ("PENDING", reason)
    assert (seen.never_starts is None) == waits


def test_jobs_of_hidden_partitions_are_seen_whatever_the_users_squeue_leaves_out(tmp_path, commands, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    command(commands, "squeue", f'echo "$@ [$SQUEUE_PARTITION]" >> {tmp_path}/asked')
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    cluster.status.squeue()
    cluster._find(tmp_path)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2
    assert all(" --all " in line and line.endswith("[]") for line in asked)


def observe_vanished(folder: Path, commands: Path, monkeypatch, scancel: str) -> dict[str, status.Observation]:
    """What one look makes of a job that SLURM does not name any more, where scancel does this."""
    command(commands, "squeue", "exit 0")
    command(commands, "sacct", "exit 1")
    command(commands, "scancel", scancel)
    monkeypatch.setitem(status.SETTLES_AFTER, "missing", 0)
    one = submission(folder, "17")
    one.first_submitted = 1.0
    return slurm.SlurmCluster(logging.getLogger("test")).observe([one])


def test_a_job_that_is_called_lost_is_cancelled_should_it_run_unseen(tmp_path, commands, monkeypatch):
    seen = observe_vanished(tmp_path, commands, monkeypatch, f'echo "$@" >> {tmp_path}/cancelled')
    assert seen["17"].state == "LOST"
    assert (tmp_path / "cancelled").read_text() == "17\n"


def test_a_job_that_vanished_and_cannot_be_cancelled_is_not_called_lost(tmp_path, commands, monkeypatch):
    failing = f"echo 'scancel: error: {UNREACHABLE}' >&2; exit 1"
    assert observe_vanished(tmp_path, commands, monkeypatch, failing) == {}


def test_while_squeue_fails_a_job_is_not_submitted_a_second_time(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(slurm, "RETRY_SECONDS", (0, 0, 0))
    command(commands, "sbatch", f"echo >> {tmp_path}/environment; echo '{UNREACHABLE}' >&2; exit 1")
    command(commands, "squeue", f"echo >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) = 3 ] && echo '17|job'")
    assert submit(slurm.SlurmCluster(logging.getLogger("test")), tmp_path) == set()
    assert (tmp_path / "environment").read_text() == "\n"


def test_what_an_unreachable_cluster_took_after_all_is_cancelled_before_its_successor(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(slurm, "RETRY_SECONDS", ())
    command(commands, "scancel", f'echo "$@" >> {tmp_path}/cancelled')
    command(commands, "squeue", "echo '16|job'")
    command(commands, "sbatch", f"echo '{UNREACHABLE}' >&2; exit 1")
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    with pytest.raises(NotReached):
        submit(cluster, tmp_path)
    command(commands, "sbatch", f"env > {tmp_path}/environment; echo Submitted batch job 17")
    for _ in range(2):
        submit(cluster, tmp_path)
    assert (tmp_path / "cancelled").read_text() == "16\n"


def test_a_job_whose_submission_is_interrupted_is_cancelled_once_sbatch_has_answered(tmp_path, commands):
    answer = f"ps -o sid= -p $$ > {tmp_path}/session; sleep 1; echo '17|job' > {tmp_path}/queue"
    command(commands, "sbatch", f"{answer}; echo Submitted batch job 17")
    command(commands, "squeue", f"cat {tmp_path}/queue")
    command(commands, "scancel", f'echo "$@" >> {tmp_path}/cancelled')

    def interrupt():
        while not (tmp_path / "session").exists():
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Where these tests run in the background of a shell, SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            submit(slurm.SlurmCluster(logging.getLogger("test")), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "cancelled").read_text() == "17\n"
    assert int((tmp_path / "session").read_text()) != os.getsid(0)  # a terminal's Ctrl-C does not reach it


def test_a_full_account_is_no_refusal(tmp_path, commands):
    words = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    command(commands, "sbatch", f"echo '{words}' >&2; exit 1")
    with pytest.raises(NotReached, match="AssocMaxSubmitJobLimit"):
        submit(slurm.SlurmCluster(logging.getLogger("test")), tmp_path)


def test_a_cluster_that_takes_no_job_now_is_asked_until_it_does(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "FULL_SECONDS", 0)
    answers = [NotReached("full"), NotReached("full"), "submitted"]

    def answer(job, command):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    executor = object.__new__(plugin.Executor)
    executor.ready, executor.logger, executor.driver = True, logging.getLogger("test"), SimpleNamespace(submit=answer)
    assert executor._submit_patiently(None) == "submitted"
    assert caplog.messages == ["full; asking again in 0 s"] * 2


@pytest.mark.parametrize(
    ("error", "said", "attempt"),
    [
        (OSError(28, "No space left on device"), "/run/jobs: not submitted: No space left on device", 1),
        (
            OSError(28, "No space left on device", "/run/jobs/ledger.jsonl"),
            "/run/jobs/ledger.jsonl: not submitted: ",
            1,
        ),
        (ValueError("sbatch refused the job"), "sbatch refused the job", 4),
    ],
)
def test_a_submission_that_fails_ends_only_its_own_job_and_a_full_disk_leaves_the_retries(
    monkeypatch, error, said, attempt
):
    ended = []

    def refuse(job, command):
        raise error

    executor = object.__new__(plugin.Executor)
    executor.ready, executor.logger, executor.lock, executor.active_jobs = (
        True,
        logging.getLogger("test"),
        threading.Lock(),
        [],
    )
    monkeypatch.setattr(executor, "report_job_submission", lambda info, register_job: executor.active_jobs.append(info))
    monkeypatch.setattr(executor, "report_job_error", lambda info, msg: ended.append(msg))
    executor.driver = SimpleNamespace(submit=refuse, folder=Path("/run/jobs"))
    job = SimpleNamespace(attempt=1, restart_times=3)
    executor.run_job(job)
    assert (len(ended), executor.active_jobs, job.attempt) == (1, [], attempt)
    assert ended[0].startswith(said)


ALL = ["17", "18", "19"]


@pytest.mark.parametrize(
    ("script", "left", "calls"),
    [
        ("exit 0", [], 1),
        (f"echo 'scancel: error: {UNREACHABLE}' >&2; exit 1", ALL, 4),
        ("echo 'scancel: error: Kill job error on job id 18: Access/permission denied' >&2; exit 1", ["18"], 1),
        ("echo 'scancel: error: Kill job error on job id 17: Invalid job id specified' >&2; exit 1", [], 1),
        (f'for id; do echo "scancel: error: Kill job error on job id $id: {UNREACHABLE}" >&2; done; exit 3', ALL, 4),
        ("exit 1", ALL, 1),
    ],
)
def test_what_scancel_could_not_cancel_is_returned_and_said(tmp_path, commands, caplog, script, left, calls):
    command(commands, "scancel", f"echo >> {tmp_path}/calls; {script}")
    cluster = slurm.SlurmCluster(logging.getLogger("test"))
    assert cluster.cancel([submission(tmp_path, job_id) for job_id in ALL]) == left
    assert (tmp_path / "calls").read_text().count("\n") == calls
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == bool(left)
    if left:
        assert f"{len(left)} of 3 jobs could not be cancelled and go on: {', '.join(left)}. scancel: " in said[0]
        assert said[0].endswith(f"\n  Cancel by hand: scancel {' '.join(left)}")
        assert said[0].count(UNREACHABLE) == (UNREACHABLE in script)


def test_nothing_to_cancel_calls_nothing(tmp_path, commands):
    command(commands, "scancel", f"touch {tmp_path}/called")
    assert slurm.SlurmCluster(logging.getLogger("test")).cancel([]) == []
    assert not (tmp_path / "called").exists()


def test_a_job_finds_its_python_and_its_folder_below_any_path(tmp_path, monkeypatch):
    """Both the local and the SLURM executor run the command through `sh -c`."""
    odd = tmp_path / 'it\'s $HOME, "mine"'
    odd.mkdir()
    (odd / "python").symlink_to("/bin/echo")
    monkeypatch.setattr(sys, "executable", str(odd / "python"))
    executor = object.__new__(plugin.Executor)
    settings = SimpleNamespace(assume_common_workdir=False)
    executor.workflow = SimpleNamespace(workdir_init=str(odd), storage_settings=settings)
    script = f"{executor.get_job_exec_prefix(None)} && pwd && {executor.get_python_executable()} -m snakemake"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(odd), f"-m {plugin.__name__}.sigterm -m snakemake"], done.stderr
