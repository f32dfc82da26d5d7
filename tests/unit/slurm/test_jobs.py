"""`nanochat jobs`: a line a job, over all of its attempts; `--follow` survives a new log file."""

import subprocess
import sys
import time

from snakemake_executor_plugin_submitit.jobs import table
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


def test_following_a_log_ends_with_the_job(tmp_path):
    ledger, log = tmp_path / "ledger.jsonl", tmp_path / "base.log"
    log.write_text("first\n")
    append(ledger, attempt(state="RUNNING", started=1.0, log=str(log)))
    follower = subprocess.Popen(
        [*JOBS, "--ledger", str(ledger), "--follow", "base"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert follower.stdout.readline() == "first\n"
    (tmp_path / "new").write_text("second attempt\n")
    (tmp_path / "new").rename(log)
    assert follower.stdout.readline() == "second attempt\n"
    time.sleep(0.1)
    append(ledger, attempt(state="COMPLETED", started=1.0, ended=2.0, log=str(log)))
    assert follower.wait(10) == 0


def test_a_stage_that_never_ran_is_named(tmp_path):
    append(tmp_path / "ledger.jsonl", attempt(state="COMPLETED"))
    done = subprocess.run(
        [*JOBS, "--ledger", str(tmp_path / "ledger.jsonl"), "--follow", "sft"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no job of sft yet; there are: base" in done.stderr
