"""`nanochat jobs`: a line a job, over all of its attempts; `--follow` survives a new log file."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from snakemake_executor_plugin_submitit.exits import status_path, write_whole
from snakemake_executor_plugin_submitit.jobs import follow, main, table
from snakemake_executor_plugin_submitit.ledger import append, new_record

JOBS = [sys.executable, "-m", "snakemake_executor_plugin_submitit.jobs"]


def attempt(**known) -> dict:
    return new_record(**{"rule": "base", "job_id": "7", "attempt": 1, "gpus": 4, "log": "base.log", **known})


def test_a_job_is_one_line_over_its_attempts():
    records = [
        attempt(state="PREEMPTED", started=1000.0, ended=4600.0, node_names=["gpu1"]),
        attempt(restart=1, state="RUNNING", started=5000.0, node_names=["gpu2"]),
        attempt(rule="evaluate", wildcards={"stage": "sft"}, job_id="8", state="PENDING", reason="Resources"),
    ]
    lines = table(records, now=8600.0).splitlines()
    assert lines[1].split() == ["base", "7", "RUNNING", "2:00:00", "1", "gpu2", "8.00", "base.log"]
    assert lines[2].startswith("evaluate-sft  8    PENDING (Resources)")
    assert len(table(records, 8600.0, every_attempt=True).splitlines()) == 4


def says(folder, restart: int, **known) -> None:
    """What a job writes of itself."""
    status = {"state": "ended", "kind": "success", "exit_code": 0, "asked": None, "started": None, "ended": None}
    write_whole(status_path(folder, restart), json.dumps(status | known))


@pytest.mark.parametrize("every_attempt", [False, True])
def test_a_job_that_ended_without_its_driver_is_counted_to_its_own_end(tmp_path, every_attempt):
    says(tmp_path, 0, started=1000.0, ended=8200.0)
    records = [attempt(state="RUNNING", started=1000.0, folder=str(tmp_path))]
    line = table(records, 1e6, every_attempt).splitlines()[1].split()
    assert line == ["base", "7", "ENDED", "(success)", "2:00:00", "0", "-", "8.00", "base.log"]


def test_runs_that_no_driver_saw_are_counted_once(tmp_path):
    says(tmp_path, 0, state="running", started=1000.0)  # its node died
    says(tmp_path, 1, kind="checkpointed", exit_code=85, started=4600.0, ended=8200.0)
    says(tmp_path, 2, state="running", started=9000.0)
    lines = table([attempt(state="PENDING", folder=str(tmp_path))], 12600.0).splitlines()
    assert lines[1].split() == ["base", "7", "RUNNING", "3:00:00", "2", "-", "12.00", "base.log"]


def test_following_goes_on_with_the_attempt_that_a_driver_submits_after_an_end(tmp_path, capsys):
    ledger, log = tmp_path / "ledger.jsonl", tmp_path / "base.log"
    append(ledger, attempt(state="NODE_FAIL", started=1.0, ended=2.0, log=str(log)))

    def driver():
        time.sleep(0.5)  # sbatch
        append(ledger, attempt(job_id="8", state="PENDING", log=str(log)))
        log.write_text("second attempt\n")
        append(ledger, attempt(job_id="8", state="COMPLETED", started=3.0, ended=4.0, log=str(log)))

    thread = threading.Thread(target=driver)
    thread.start()
    assert follow(ledger, "base", 0.05, successor_seconds=20) == 0
    thread.join()
    assert capsys.readouterr().out == "second attempt\n"


@pytest.mark.parametrize("known", [{"state": "CANCELLED"}, {"state": "FAILED", "exit_code": 2}])
def test_following_ends_at_once_where_no_driver_tries_again(tmp_path, known):
    append(tmp_path / "ledger.jsonl", attempt(started=1.0, ended=2.0, **known))
    began = time.monotonic()
    assert follow(tmp_path / "ledger.jsonl", "base", 0.05, successor_seconds=20) == 1
    assert time.monotonic() - began < 5


def test_following_gives_up_when_no_successor_comes(tmp_path, capsys):
    append(tmp_path / "ledger.jsonl", attempt(state="TIMEOUT", started=1.0, ended=2.0))
    began = time.monotonic()
    assert follow(tmp_path / "ledger.jsonl", "base", 0.05, successor_seconds=0.5) == 1
    assert time.monotonic() - began > 0.5
    assert capsys.readouterr().err == "[TIMEOUT]\n"


@pytest.mark.parametrize(("kind", "code", "result"), [("success", 0, 0), ("user_error", 2, 1), ("program", 1, 1)])
def test_following_ends_with_the_job_when_its_driver_is_dead(tmp_path, kind, code, result):
    append(tmp_path / "ledger.jsonl", attempt(cluster="slurm", state="RUNNING", started=1.0, folder=str(tmp_path)))
    says(tmp_path, 0, kind=kind, exit_code=code, started=1.0, ended=2.0)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(follow(tmp_path / "ledger.jsonl", "base", 0.05, 0.3)), daemon=True
    )
    thread.start()
    thread.join(10)
    assert found == [result]


def test_following_waits_for_a_requeue_without_a_driver(tmp_path, capsys):
    append(tmp_path / "ledger.jsonl", attempt(cluster="slurm", state="RUNNING", started=1.0, folder=str(tmp_path)))
    says(tmp_path, 0, kind="checkpointed", exit_code=85, asked="SIGUSR2", started=1.0, ended=2.0)
    timer = threading.Timer(1.0, says, [tmp_path, 1], {"started": 300.0, "ended": 400.0})
    timer.start()
    assert follow(tmp_path / "ledger.jsonl", "base", 0.05, 0.1) == 0
    assert capsys.readouterr().err.splitlines() == [
        "[ENDED (checkpointed), SLURM may run it again: waiting]",
        "[ENDED: success]",
    ]


def follow_a_log(folder: Path, text: str) -> tuple[Path, Path, subprocess.Popen]:
    """Ledger and log of a job that runs, and a process that has read `text`, one line, from it."""
    ledger, log = folder / "ledger.jsonl", folder / "base.log"
    log.write_text(text)
    append(ledger, attempt(state="RUNNING", started=1.0, log=str(log)))
    follower = subprocess.Popen(
        [*JOBS, "--ledger", str(ledger), "--follow", "base"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert follower.stdout.readline() == text
    return ledger, log, follower


def test_following_a_log_ends_with_the_job(tmp_path):
    ledger, log, follower = follow_a_log(tmp_path, "first\n")
    (tmp_path / "new").write_text("second attempt\n")
    (tmp_path / "new").rename(log)
    assert follower.stdout.readline() == "second attempt\n"
    time.sleep(0.1)
    append(ledger, attempt(state="COMPLETED", started=1.0, ended=2.0, log=str(log)))
    assert follower.wait(10) == 0


@pytest.mark.parametrize("name", ["evaluate", "evaluate/sft", "evaluate_stage", "evaluate_stage-sft"])
def test_a_job_may_be_called_as_its_target(tmp_path, capsys, name):
    path, log = tmp_path / "jobs/ledger.jsonl", tmp_path / "evaluate/sft.log"
    log.parent.mkdir()
    path.parent.mkdir()
    log.write_text("cloze 0.3\n")
    known = {"rule": "evaluate_stage", "wildcards": {"stage": "sft"}, "log": str(log)}
    append(path, attempt(**known, state="COMPLETED", started=1.0, ended=2.0, exit_code=0))
    append(path, attempt(job_id="8", log=str(tmp_path / "base/base.log"), state="COMPLETED", exit_code=0))
    assert follow(path, name) == 0
    assert capsys.readouterr().out == "cloze 0.3\n"
    assert follow(path, "sft") == 1
    assert "there are: base, evaluate/sft" in capsys.readouterr().err


def test_a_stage_that_never_ran_is_named(tmp_path):
    append(tmp_path / "ledger.jsonl", attempt(state="COMPLETED"))
    done = subprocess.run(
        [*JOBS, "--ledger", str(tmp_path / "ledger.jsonl"), "--follow", "sft"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no job of sft yet; there are: base" in done.stderr


def test_the_jobs_of_a_run_are_found_from_any_working_directory(tmp_path, monkeypatch, capsys):
    """Also beside a run whose paths are the same."""
    for run, said in (("a", "other\n"), ("b", "cloze 0.3\n")):
        results = tmp_path / run / "results"
        log = results / "base/base.log"
        log.parent.mkdir(parents=True)
        log.write_text(said)
        known = {"folder": "results/jobs/base-1", "log": "results/base/base.log", "started": 1000.0, "state": "RUNNING"}
        append(results / "jobs/ledger.jsonl", attempt(**known))
    says(tmp_path / "b/results/jobs/base-1", 0, started=1000.0, ended=8200.0)
    says(tmp_path / "a/results/jobs/base-1", 0, state="running", started=1000.0)
    for place, results in (("a", "../b/results"), (".", "b/results"), ("b", "results"), (".", tmp_path / "b/results")):
        monkeypatch.chdir(tmp_path / place)
        assert main(["--results", str(results)]) == 0
        line = capsys.readouterr().out.splitlines()[1].split()
        assert line[2:5] == ["ENDED", "(success)", "2:00:00"]
        assert line[-1] == f"{results}/base/base.log"
        assert main(["--results", str(results), "--follow", "base"]) == 0
        assert capsys.readouterr().out == "cloze 0.3\n"


def test_following_sees_a_new_log_that_has_the_old_ones_inode(tmp_path):
    ledger, log, follower = follow_a_log(tmp_path, "first attempt, step 100\n")
    log.write_text("second attempt\n")
    time.sleep(1.2)  # two of its looks
    append(ledger, attempt(state="COMPLETED", started=1.0, ended=2.0, log=str(log)))
    assert follower.communicate(timeout=10)[0] == "second attempt\n"
