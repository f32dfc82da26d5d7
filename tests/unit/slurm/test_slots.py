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


def places(folder) -> list[str]:
    return [path.name for path in (folder / "queue").glob("[0-9]*")]


def wait_for_places(folder, count: int) -> None:
    end = time.monotonic() + 10
    while len(places(folder)) < count and time.monotonic() < end:
        time.sleep(0.02)
    assert len(places(folder)) == count


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


def test_a_queue_for_one_gpu_does_not_hold_up_another(tmp_path):
    """Two drivers, each with its own CUDA_VISIBLE_DEVICES."""
    first = holder(tmp_path, 1, "0", 30)
    assert first.stdout.readline().strip() == "0"
    waiting = holder(tmp_path, 1, "0", 0)
    wait_for_places(tmp_path, 1)
    try:
        assert holder(tmp_path, 1, "1", 0).communicate(timeout=10)[0].strip() == "1"
        assert holder(tmp_path, 1, "0,1", 0).communicate(timeout=10)[0].strip() == "1"
        assert waiting.poll() is None
    finally:
        first.kill()
        first.wait()
    assert waiting.communicate(timeout=10)[0].strip() == "0"


def test_whoever_needs_all_is_not_starved_by_small_ones(tmp_path):
    first = holder(tmp_path, 1, "0,1", 30)
    assert first.stdout.readline().strip() == "0"
    large = holder(tmp_path, 2, "0,1", 1.0)
    wait_for_places(tmp_path, 1)
    small = holder(tmp_path, 1, "0,1,2", 0)  # what those before it cannot use is free to take
    assert small.communicate(timeout=10)[0].strip() == "2"
    small = holder(tmp_path, 1, "1", 0)
    wait_for_places(tmp_path, 2)
    first.kill()
    first.wait()
    assert large.stdout.readline().strip() == "1,0"
    assert small.poll() is None
    assert small.communicate(timeout=10)[0].strip() == "1"


def test_whoever_dies_in_the_queue_or_gives_up_blocks_nobody(tmp_path):
    first = holder(tmp_path, 1, "0", 30)
    assert first.stdout.readline().strip() == "0"
    dying = holder(tmp_path, 1, "0,1,2", 30)
    assert dying.stdout.readline().strip() == "1"
    large = holder(tmp_path, 2, "0,2", 30)  # holds 2, waits for 0
    wait_for_places(tmp_path, 1)

    def gives_up(seconds):
        raise InterruptedError

    with pytest.raises(InterruptedError), held(1, ["0"], tmp_path, gives_up):
        pass
    assert len(places(tmp_path)) == 1
    large.kill()
    large.wait()
    assert holder(tmp_path, 1, "2", 0).communicate(timeout=10)[0].strip() == "2"
    assert not places(tmp_path)
    for job in (first, dying):
        job.kill()
        job.wait()


def test_more_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 asked for, there are 2"), held(3, ["0", "1"], tmp_path, time.sleep):
        pass


def test_visible_gpus_follow_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5a")
    assert visible_gpus() == ["2", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
