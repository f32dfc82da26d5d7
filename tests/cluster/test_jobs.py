"""What becomes of a job that fails, waits for ever, or is cancelled, and of a cluster that cannot be asked."""

import os
import shutil
import signal
import stat
import time

import pytest
from slurm_lab import MEASURED, assert_agrees_with_sacct, wait_until

SLEEPS = """
rule all:
    input: expand("out/{{i}}", i=range({count}))
rule sleeper:
    output: "out/{{i}}"
    log: "log/{{i}}.log"
    resources: gpu={gpus}
    shell: "echo started >> count-{{wildcards.i}}; for i in $(seq {seconds}); do echo second $i >> {{log}}; sleep 1; done; touch {{output}}"
"""


def sleepers(count: int, seconds: int, gpus: int = 0) -> str:
    return SLEEPS.format(count=count, seconds=seconds, gpus=gpus)


def test_a_failing_rule_names_job_log_exit_code_and_last_lines(run):
    driver = run(
        'rule bad:\n    output: "out/bad"\n    log: "log/bad.log"\n'
        "    shell: \"(seq 40; echo 'config.yaml: model.depht: no such setting'; exit 2) > {log} 2>&1\"\n",
        "--retries",
        "2",
    )
    assert driver.wait(60) != 0
    record = driver.attempts("bad")[-1]
    assert "bad failed (exit code 2)" in driver.log
    assert f"job {record['job_id']}, log log/bad.log, on artemis-gpu" in driver.log
    assert "| config.yaml: model.depht: no such setting" in driver.log
    assert "| 39" in driver.log
    assert "| 20" not in driver.log
    assert [(r["state"], r["exit_code"]) for r in driver.attempts("bad")] == [
        ("FAILED", 2)
    ]  # a user error is not tried again


def test_scancel_from_outside_is_noticed_and_stays(run, cluster):
    driver = run(sleepers(1, 300), "--retries", "2")
    wait_until(lambda: driver.state("sleeper") == "RUNNING", 60, "a running job")
    cancelled = time.time()
    cluster.call("scancel", driver.job_id("sleeper"))
    assert driver.wait(30) != 0
    assert time.time() - cancelled < 30
    assert "cancelled by uid" in driver.log
    assert [record["state"] for record in driver.attempts()] == ["CANCELLED"]
    assert_agrees_with_sacct(driver, cluster)


def test_out_of_host_memory_is_tried_again_with_more(run, cluster):
    driver = run(
        'rule greedy:\n    output: "out/greedy"\n    log: "log/greedy.log"\n    resources: mem_mb=400\n'
        "    shell: \"python -c 'import time; block = bytearray(400 << 20); time.sleep(4)' > {log} 2>&1; touch {output}\"\n"
    )
    driver.succeeds(150)
    assert "out of host memory" in driver.log
    attempts = driver.attempts("greedy")
    assert len(attempts) >= 2
    assert attempts[-1]["state"] == "COMPLETED"
    asked = [cluster.sacct(record["job_id"], "ReqMem")[0][0] for record in attempts]
    assert asked[:2] == ["400M", "600M"]
    assert_agrees_with_sacct(driver, cluster)


def test_out_of_gpu_memory_is_tried_again_and_told_why(run, cluster):
    driver = run(
        'rule train:\n    output: "out/train"\n    log: "log/train.log"\n    resources: gpu=1\n'
        '    shell: "echo ${{ATTEMPT_REASON:-first}} ${{ATTEMPT_REASON_COUNT:-0}} >> reasons; '
        '[ ${{ATTEMPT_REASON_COUNT:-0}} = 2 ] || exit 86; touch {output}"\n'
    )
    driver.succeeds(120)
    assert (driver.folder / "reasons").read_text().splitlines() == [
        "first 0",
        "cuda_out_of_memory 1",
        "cuda_out_of_memory 2",
    ]
    assert [record["exit_code"] for record in driver.attempts("train")] == [86, 86, 0]
    assert "the GPU ran out of memory" in driver.log
    assert_agrees_with_sacct(driver, cluster)


def test_walltime_over_the_partitions_limit_is_refused_before_submission(run):
    driver = run(sleepers(1, 1), resources=("slurm_partition=gpu_high", "runtime=600"))
    assert driver.wait(60) != 0
    assert "runtime = 600 min is over the 480 min of partition gpu_high: set runtime to 480" in driver.log
    assert "Traceback" not in driver.log
    assert driver.attempts() == []


def test_a_job_that_would_wait_for_ever_is_cancelled(run, cluster):
    driver = run(sleepers(1, 1), "--submitit-doctor", "off", resources=("slurm_partition=gpu_high", "runtime=600"))
    assert driver.wait(60) != 0
    assert "it would wait for ever (PartitionTimeLimit): resources.runtime is over the partition's limit" in driver.log
    assert [record["state"] for record in driver.attempts()] == ["CANCELLED"]
    assert cluster.call("squeue", "-h") == ""


def test_an_invalid_account_fails_at_once_with_slurms_words(run):
    driver = run(sleepers(1, 1), "--submitit-doctor", "off", "--retries", "3", resources=("slurm_account=nobody",))
    assert driver.wait(60) != 0
    assert "Invalid account" in driver.log
    assert driver.log.count("sbatch refused the job") <= 2  # said, and repeated in Snakemake's own message


def test_ctrl_c_cancels_the_jobs(run, cluster):
    driver = run(sleepers(2, 300))
    wait_until(lambda: len(_running(cluster)) == 2, 60, "two running jobs")
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait(60) != 0
    wait_until(lambda: cluster.call("squeue", "-h", "-t", "R,PD") == "", 20, "an empty queue")
    assert {record["state"] for record in driver.attempts()} == {"CANCELLED"}


def test_ctrl_c_before_sbatch_has_answered_leaves_no_job(run, cluster, tmp_path):
    slow = tmp_path / "bin"
    slow.mkdir()
    sbatch = slow / "sbatch"
    real = shutil.which("sbatch", path=cluster.environment["PATH"])
    sbatch.write_text(
        f'#!/bin/sh\ntouch {tmp_path}/asked\nsleep 2\n{real} "$@" || exit\ntouch {tmp_path}/taken\nsleep 2\n'
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    driver = run(sleepers(1, 300), "--submitit-doctor", "off", PATH=f"{slow}:{cluster.environment['PATH']}")
    wait_until((tmp_path / "asked").exists, 60, "a submission")
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait(60) != 0
    wait_until((tmp_path / "taken").exists, 20, "a job that SLURM took")
    wait_until(lambda: cluster.call("squeue", "-h", "-t", "R,PD") == "", 20, "an empty queue")
    assert driver.attempts() == []


def test_a_killed_drivers_jobs_are_adopted(run, cluster):
    """One finished meanwhile, one runs, one waits: none is submitted twice."""
    first = run(sleepers(3, 12, gpus=4))
    wait_until(
        lambda: len(first.attempts()) == 3 and len(_running(cluster)) == 2, 60, "two running and one waiting job"
    )
    first.process.kill()
    first.process.wait()
    wait_until(lambda: (first.folder / "out/0").exists() or (first.folder / "out/1").exists(), 60, "one that finished")
    second = run(sleepers(3, 12, gpus=4))
    second.succeeds(120)
    assert [(first.folder / f"count-{i}").read_text().split() for i in range(3)] == [["started"]] * 3
    records = second.attempts()
    assert len(records) == 3
    assert {record["state"] for record in records} == {"COMPLETED"}
    assert "submitted by an earlier run" in second.log
    assert_agrees_with_sacct(second, cluster)


def test_slurmdbd_stopped_and_started_again(run, cluster):
    driver = run(sleepers(2, 20))
    wait_until(lambda: len(_running(cluster)) == 2, 60, "two running jobs")
    os.kill(cluster.pid("slurmdbd"), signal.SIGTERM)
    wait_until(lambda: "sacct failed" in driver.log, 60, "a word about sacct")
    time.sleep(8)  # some looks without it
    cluster.start("slurmdbd")
    driver.succeeds(120)
    assert {record["state"] for record in driver.attempts()} == {"COMPLETED"}
    wait_until(
        lambda: all(cluster.sacct(r["job_id"], "End")[0][0] != "Unknown" for r in driver.attempts()), 60, "sacct"
    )


def test_squeue_failing_for_a_minute(run, cluster, tmp_path):
    broken = tmp_path / "bin"
    broken.mkdir()
    squeue = broken / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    driver = run(sleepers(2, 30), PATH=f"{broken}:{cluster.environment['PATH']}")
    wait_until(lambda: "squeue failed" in driver.log, 60, "a word about squeue")
    time.sleep(50)
    assert driver.process.poll() is None or driver.process.returncode == 0
    squeue.unlink()
    driver.succeeds(120)
    assert {record["state"] for record in driver.attempts()} == {"COMPLETED"}


def test_slurmctld_killed_and_restarted(run, cluster):
    driver = run(sleepers(2, 30))
    wait_until(lambda: len(_running(cluster)) == 2, 60, "two running jobs")
    time.sleep(10)  # it saves its state every few seconds
    os.kill(cluster.pid("slurmctld"), signal.SIGKILL)
    time.sleep(10)
    cluster.start("slurmctld")
    driver.succeeds(180)
    assert [(driver.folder / f"count-{i}").read_text().split() for i in range(2)] == [["started"]] * 2
    assert {record["state"] for record in driver.attempts()} == {"COMPLETED"}


@pytest.mark.slow
def test_two_hundred_jobs(run, cluster, tmp_path, request):
    """Measures jobs per minute and how often SLURM is asked, counted by wrappers on the path."""
    wrappers = tmp_path / "bin"
    wrappers.mkdir()
    for name in ("squeue", "sacct", "sbatch"):
        wrapper = wrappers / name
        wrapper.write_text(f'#!/bin/sh\necho x >> {wrapper}.calls\nexec {cluster.call("which", name)} "$@"\n')
        wrapper.chmod(0o755)
    driver = run(
        'rule all:\n    input: expand("out/{i}", i=range(200))\n'
        'rule one:\n    output: "out/{i}"\n    threads: 4\n    shell: "touch {output}"\n',  # 8 at once: they share 2 real cores
        *("--jobs", "200", "--submitit-poll-seconds", "10"),
        resources=("mem_mb=100",),
        PATH=f"{wrappers}:{cluster.environment['PATH']}",
    )
    driver.succeeds(600)
    elapsed = time.time() - driver.started
    calls = {path.stem: len(path.read_text().split()) for path in wrappers.glob("*.calls")}
    MEASURED.append((request.node.name, f"{elapsed:.0f} s, {200 / elapsed * 60:.0f} jobs a minute; calls of {calls}"))
    assert calls["sbatch"] == 200
    assert calls["squeue"] < 100
    assert calls["sacct"] < 100
    assert len(driver.attempts()) == 200
    assert {record["state"] for record in driver.attempts()} == {"COMPLETED"}


def _running(cluster) -> list[str]:
    return cluster.call("squeue", "-h", "-t", "R", "-o", "%i").split()
