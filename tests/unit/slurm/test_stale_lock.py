"""The locks of a killed driver go, all others stay."""

import json
import os
import subprocess
import sys

import pytest
from snakemake_executor_plugin_submitit.stale_lock import is_locked, remove_stale_lock

DRIVER = """
import sys
from pathlib import Path
from snakemake_executor_plugin_submitit.stale_lock import record_holder, remove_stale_lock

folder, name, recorded = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "recorded"
remove_stale_lock(folder)
(folder / "locks" / name).write_text("results/report.md\\n")
if recorded:
    record_holder(folder)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def drive(tmp_path):
    """A function that starts a driver which takes a lock as Snakemake does, in `tmp_path`."""
    (tmp_path / "locks").mkdir()
    drivers = []

    def start(name: str, recorded: str = "recorded") -> subprocess.Popen:
        pipe = subprocess.PIPE
        drivers.append(
            subprocess.Popen([sys.executable, "-c", DRIVER, tmp_path, name, recorded], stdin=pipe, stdout=pipe)
        )
        assert drivers[-1].stdout.readline() == b"held\n"
        return drivers[-1]

    yield start
    for driver in drivers:
        kill(driver)


def kill(driver: subprocess.Popen) -> None:
    driver.kill()
    driver.wait()


def locks(folder) -> set[str]:
    return {path.name for path in (folder / "locks").iterdir()}


def test_the_lock_of_a_killed_driver_is_removed(tmp_path, drive):
    holder = drive("0.output.lock")
    kill(holder)
    assert remove_stale_lock(tmp_path) == holder.pid
    assert not locks(tmp_path)
    assert not list((tmp_path / "holders").iterdir())


def test_the_lock_of_a_living_driver_stays(tmp_path, drive):
    drive("0.output.lock")
    assert remove_stale_lock(tmp_path) is None
    assert locks(tmp_path) == {"0.output.lock"}


@pytest.mark.parametrize("killed", [0, 1])
def test_of_two_drivers_only_the_dead_one_loses_its_lock(tmp_path, drive, killed):
    """Snakemake locks files, so that two runs with different `results` share a folder."""
    drivers = [drive("0.output.lock"), drive("1.output.lock")]
    kill(drivers[killed])
    assert remove_stale_lock(tmp_path) == drivers[killed].pid
    assert locks(tmp_path) == {f"{1 - killed}.output.lock"}


def test_a_lock_that_a_living_driver_names_too_stays(tmp_path, drive):
    """Two that start in the same second cannot tell their locks apart."""
    dead, living = drive("0.output.lock"), drive("1.output.lock")
    for driver in (dead, living):
        (record,) = (tmp_path / "holders").glob(f"*-{driver.pid}.json")
        both = {name: (tmp_path / "locks" / name).stat().st_mtime_ns for name in locks(tmp_path)}
        record.write_text(json.dumps(json.loads(record.read_text()) | {"locks": both}))
    kill(dead)
    assert remove_stale_lock(tmp_path) is None
    assert locks(tmp_path) == {"0.output.lock", "1.output.lock"}


def test_a_lock_younger_than_the_record_stays(tmp_path, drive):
    """A new driver has the lock already and its record not yet; the names of locks come round again."""
    kill(drive("0.output.lock"))
    later = (tmp_path / "locks/0.output.lock").stat().st_mtime + 10
    os.utime(tmp_path / "locks/0.output.lock", (later, later))
    assert remove_stale_lock(tmp_path) is None
    assert locks(tmp_path)


def test_the_lock_of_another_host_stays(tmp_path, drive):
    kill(drive("0.output.lock"))
    (record,) = (tmp_path / "holders").iterdir()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"host": "elsewhere"}))
    assert remove_stale_lock(tmp_path) is None
    assert locks(tmp_path)


def test_a_lock_without_a_record_stays(tmp_path, drive):
    kill(drive("0.output.lock", "unrecorded"))
    kill(drive("1.output.lock"))
    remove_stale_lock(tmp_path)
    assert locks(tmp_path) == {"0.output.lock"}


def test_a_driver_locks_its_results_and_no_others(tmp_path, drive):
    assert not is_locked("results", tmp_path)
    drive("0.output.lock")
    assert is_locked("results", tmp_path)
    assert not is_locked("res", tmp_path)
