"""Results come in order; a worker neither outlives its parent nor dies unnoticed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nanochat.data.parallel import cpus, in_order
from nanochat.errors import UserError


def doubled(number: int) -> int:
    time.sleep(0.02 if number % 2 else 0)
    return 2 * number


def refuse_three(number: int) -> int:
    if number == 3:
        raise UserError("three: not liked. Give another.")
    return number


def end_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def linger(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(600)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(in_order(doubled, range(12), workers)) == [2 * i for i in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_here(workers):
    with pytest.raises(UserError, match="three: not liked"):
        list(in_order(refuse_three, range(8), workers))


def test_a_worker_that_was_killed_is_said():
    with pytest.raises(UserError, match="a worker process of 2 was killed; most often memory ran out"):
        list(in_order(end_at_three, range(8), 2))


def test_who_stops_early_leaves_no_work_undone_behind():
    started = time.monotonic()
    for result in in_order(doubled, range(10**9), 2):
        assert result == 0
        break
    assert time.monotonic() - started < 30


def test_slurm_limits_the_cpus(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cpus() == 1


def test_workers_end_when_the_parent_is_killed(tmp_path):
    pids = tmp_path / "pids"
    code = f"from {__name__} import linger, in_order; list(in_order(linger, [{str(pids)!r}] * 2, 2))"
    folder = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    finally:
        parent.kill()
        parent.wait()
    assert eventually(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))


def eventually(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
