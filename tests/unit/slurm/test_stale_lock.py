"""The lock of a killed driver goes, any other stays."""

import json
import os
import subprocess
import sys

import pytest
from snakemake_executor_plugin_submitit.stale_lock import record_holder, remove_stale_lock


@pytest.fixture
def locked(tmp_path):
    """A Snakemake folder with a lock; returns a function that records a holder in a process of its own."""
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks/0.output.lock").write_text("results/report.md\n")
    program = (
        "import sys; from pathlib import Path; from snakemake_executor_plugin_submitit.stale_lock import record_holder;"
        "record_holder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )

    def hold():
        pipe = subprocess.PIPE
        holder = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdin=pipe, stdout=pipe)
        assert holder.stdout.readline() == b"held\n"
        return holder

    return tmp_path, hold


def test_the_lock_of_a_killed_driver_is_removed(locked):
    folder, hold = locked
    holder = hold()
    holder.kill()
    holder.wait()
    assert remove_stale_lock(folder) == holder.pid
    assert not list((folder / "locks").iterdir())


def test_the_lock_of_a_living_driver_stays(locked):
    folder, hold = locked
    holder = hold()
    try:
        assert remove_stale_lock(folder) is None
        assert list((folder / "locks").iterdir())
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_younger_than_the_record_stays(locked):
    """A new driver has the lock already and its record not yet."""
    folder, hold = locked
    holder = hold()
    holder.kill()
    holder.wait()
    later = (folder / "holder.json").stat().st_mtime + 10
    os.utime(folder / "locks/0.output.lock", (later, later))
    assert remove_stale_lock(folder) is None


def test_the_lock_of_another_host_stays(locked):
    folder, _ = locked
    record_holder(folder)
    holder = json.loads((folder / "holder.json").read_text())
    (folder / "holder.json").write_text(json.dumps(holder | {"host": "elsewhere", "pid": 2**22 + 1}))
    assert remove_stale_lock(folder) is None


def test_a_lock_without_a_record_stays(locked):
    folder, _ = locked
    assert remove_stale_lock(folder) is None
