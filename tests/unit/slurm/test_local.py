"""A job of this machine that vanished is charged to its last sign of life."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from snakemake_executor_plugin_submitit import exits, ledger, local, resources, work

NOW = time.time()
STARTED = NOW - 62 * 3600


@pytest.fixture
def vanished(tmp_path, monkeypatch):
    """A submission that started 62 h ago and whose process is gone; its newest files are those of 2 h later."""
    monkeypatch.setattr(psutil, "boot_time", lambda: NOW - 1000 * 3600)
    folder, log = tmp_path / "base-x", tmp_path / "base.log"
    status = {"state": "running", "pid": 2**22 + 1, "started": STARTED, "ended": None, "exit_code": None, "kind": None}
    exits.write_whole(exits.status_path(folder, 0), json.dumps(status))
    (folder / "12_0_log.out").write_text("")
    log.write_text("step 5\n")
    for path, hours in [(exits.status_path(folder, 0), 0), (folder / "12_0_log.out", 1), (folder, 0), (log, 2)]:
        os.utime(path, (STARTED + hours * 3600,) * 2)
    record = ledger.new_record(
        rule="base", job_id="base-x", attempt=1, started=STARTED, submitted=STARTED, pid=2**22 + 2, log=str(log)
    )
    return work.Submission(record, resources.Request(), folder, tmp_path / "token")


def observe(submission):
    return local.LocalCluster("", 1, 1.0).observe([submission])["base-x"]


@pytest.mark.parametrize("newest", ["log", "output", "status", "folder"])
def test_it_ended_when_it_last_wrote(vanished, newest):
    path = {
        "log": vanished.log,
        "output": vanished.folder / "12_0_log.out",
        "status": exits.status_path(vanished.folder, 0),
        "folder": vanished.folder,
    }[newest]
    os.utime(path, (STARTED + 3 * 3600,) * 2)
    seen = observe(vanished)
    assert (seen.state, seen.started) == ("LOST", STARTED)
    assert seen.ended == pytest.approx(STARTED + 3 * 3600, abs=1)


def test_it_ended_before_the_machine_booted(vanished, monkeypatch):
    os.utime(vanished.log, (NOW, NOW))  # somebody edited it
    monkeypatch.setattr(psutil, "boot_time", lambda: STARTED + 4 * 3600)
    assert observe(vanished).ended == STARTED + 4 * 3600


def test_it_never_ends_before_it_started_or_after_now(vanished):
    os.utime(vanished.log, (NOW + 3600, NOW + 3600))
    assert observe(vanished).ended <= time.time()
    for path in (vanished.log, vanished.folder, *vanished.folder.iterdir()):
        os.utime(path, (STARTED - 3600,) * 2)
    assert observe(vanished).ended == STARTED


def test_a_silent_job_that_a_driver_watched_ended_after_its_last_look(vanished):
    program = "import sys, time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, vanished.folder], stdout=subprocess.PIPE)
    process.stdout.readline()
    vanished.record["pid"] = process.pid
    cluster = local.LocalCluster("", 1, 1.0)
    assert cluster.observe([vanished])["base-x"].state == "RUNNING"
    process.kill()
    process.wait()
    seen = cluster.observe([vanished])["base-x"]
    assert seen.state == "LOST"
    assert NOW <= seen.ended <= time.time()


@pytest.mark.parametrize(
    ("rule", "request_", "gpus", "words"),
    [
        (
            "base",
            resources.Request(gpus=1),
            "",
            "resources.gpu = 1 (train.base.gpus in config.yaml): this machine has 0 (none). Set train.base.gpus to 0, or",
        ),
        ("run_benchmark", resources.Request(gpus=3), "0,1", "has 2 (0, 1). Set benchmark.gpus to 2 or fewer, or"),
        (
            "other",
            resources.Request(gpus=3),
            "0,1",
            "rule other: resources.gpu = 3: this machine has 2 (0, 1). Set gpu to",
        ),
        (
            "mid",
            resources.Request(gpus=2, nodes=2),
            "0,1",
            "resources.nodes = 2 (train.mid.nodes in config.yaml): this",
        ),
    ],
)
def test_what_this_machine_has_not_is_told_by_the_setting_that_asks_for_it(rule, request_, gpus, words):
    with pytest.raises(ValueError, match="rule ") as error:
        local.LocalCluster(gpus, 1, 1.0).check(rule, request_)
    assert words in str(error.value)
