"""No two jobs on one GPU, whoever started them; a dead job's GPU is free."""

import subprocess
import sys
import time

import pytest
from snakemake_executor_plugin_submitit.slots import held, visible_gpus

HOLD = """
import sys, time
from pathlib import Path
from snakemake_executor_plugin_submitit.slots import held
with held(int(sys.argv[2]), sys.argv[3].split(","), Path(sys.argv[1]), time.sleep) as got:
    print(",".join(got), flush=True)
    time.sleep(float(sys.argv[4]))
"""


def holder(folder, count: int, gpus: str, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, str(count), gpus, str(seconds)], stdout=subprocess.PIPE, text=True
    )


def test_two_jobs_get_different_gpus(tmp_path):
    jobs = [holder(tmp_path, 1, "0,1", 1.0) for _ in range(2)]
    assert {job.communicate()[0].strip() for job in jobs} == {"0", "1"}


def test_a_third_waits_until_one_is_free(tmp_path):
    first = holder(tmp_path, 2, "0,1", 30)
    assert first.stdout.readline().strip() == "0,1"
    second = holder(tmp_path, 1, "0,1", 0)
    time.sleep(0.8)
    assert second.poll() is None
    first.kill()  # the kernel frees what a killed job held
    first.wait()
    assert second.communicate(timeout=10)[0].strip() == "0"


def test_more_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 asked for, there are 2"), held(3, ["0", "1"], tmp_path, time.sleep):
        pass


def test_visible_gpus_follow_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5a")
    assert visible_gpus() == ["2", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
