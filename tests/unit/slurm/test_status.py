"""What squeue and sacct print, real output of SLURM 22.05, becomes states and times."""

from dataclasses import replace
from pathlib import Path

import pytest
from snakemake_executor_plugin_submitit.ledger import new_record
from snakemake_executor_plugin_submitit.resources import Request
from snakemake_executor_plugin_submitit.status import (
    SACCT_FIELDS,
    SETTLES_AFTER,
    Observation,
    SlurmStatus,
    _state,
    expand_nodes,
    never_starts,
    parse_sacct,
    seconds,
)
from snakemake_executor_plugin_submitit.work import Submission

RECORDED = (Path(__file__).parent / "fixtures/sacct_22.05.8.txt").read_text()


def recorded_runs() -> dict:
    """The recording, cut to the columns that we ask for; `-X` leaves the steps out."""
    names, *lines = RECORDED.splitlines()
    columns = [names.split("|").index(name) for name in SACCT_FIELDS]
    rows = []
    for line in lines:
        values = line.split("|")
        if len(values) < len(names.split("|")):
            rows.append(line)  # the rest of a row that a multi-line command broke
        elif "." not in values[0]:
            rows.append("|".join(values[column] for column in columns))
    return parse_sacct("\n".join(rows), list(SACCT_FIELDS))


@pytest.mark.parametrize(
    ("job", "states"),
    [
        ("1", ["COMPLETED"]),
        ("2", ["REQUEUED", "COMPLETED"]),
        ("3", ["FAILED"]),
        ("7", ["PREEMPTED", "COMPLETED"]),
        ("12", ["TIMEOUT"]),
        ("20", ["CANCELLED"]),
        ("23", ["PENDING"]),
        ("26", ["NODE_FAIL", "COMPLETED"]),
    ],
)
def test_every_run_of_a_job_is_seen(job, states):
    assert [run.state for run in recorded_runs()[job]] == states


def test_times_nodes_and_gpus_of_a_requeued_job():
    first, second = recorded_runs()["7"]
    assert first.nodes == ["artemis-gpu1", "artemis-gpu2"]
    assert first.gpu_type == "a100"
    assert first.ended - first.started == 19
    assert second.started > first.ended
    assert first.settled
    assert second.settled


def test_a_waiting_job_has_no_times():
    (run,) = recorded_runs()["23"]
    assert (run.started, run.ended, run.nodes, run.settled) == (None, None, [], False)
    assert run.reason == "PartitionTimeLimit"


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("CANCELLED by 0", "CANCELLED"),
        ("NODE_FAIL+", "NODE_FAIL"),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("COMPLETING", "RUNNING"),
        ("CONFIGURING", "PENDING"),
        ("DEADLINE", "TIMEOUT"),
    ],
)
def test_states_match_by_prefix(text, state):
    assert _state(text) == state


@pytest.mark.parametrize(
    "reason",
    [
        "PartitionTimeLimit",
        "(PartitionConfig)",
        "QOSMaxWallDurationPerJobLimit",
        "AssocMaxWallDurationPerJobLimit",
        "InvalidAccount",
        "InvalidQOS",
        "BadConstraints",
        "JobHeldAdmin",
    ],
)
def test_waiting_for_ever_is_recognised(reason):
    assert never_starts(reason)


@pytest.mark.parametrize(
    "reason", ["Resources", "Priority", "BeginTime", "QOSMaxGRESPerUser", "ReqNodeNotAvail", "Dependency"]
)
def test_waiting_for_a_while_is_not(reason):
    assert never_starts(reason) is None


def test_times():
    assert seconds("Unknown") is None
    assert seconds("N/A") is None
    assert seconds("1795367839") == 1795367839.0
    assert seconds("2026-11-22T15:25:30") - seconds("2026-11-22T15:25:25") == 5


def test_node_lists():
    assert expand_nodes("gpu[1-2,05],login") == ["gpu1", "gpu2", "gpu05", "login"]
    assert expand_nodes("None assigned") == []


def test_a_command_that_fails_is_left_alone_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = []
    status = SlurmStatus(said.append)
    assert [status.squeue() for _ in range(5)] == [None] * 5
    assert status.calls["squeue"] == 1
    assert len(said) == 1


def test_a_preempted_job_is_given_time_to_come_back_each_time(tmp_path, monkeypatch):
    """PREEMPTED is the end only where it lasts: a requeue may follow, and another preemption after it."""
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    status = SlurmStatus(print)
    submission = Submission(new_record(rule="base", job_id="7", attempt=1), Request(), tmp_path, tmp_path / "token")
    preempted = Observation("PREEMPTED", started=900.0, ended=1000.0, settled=True)

    def judged(runs: int) -> str:
        return status._judge(submission, None, True, [replace(preempted) for _ in range(runs)]).state

    assert judged(runs=1) == "PENDING"
    now += SETTLES_AFTER["PREEMPTED"] + 1
    assert judged(runs=2) == "PENDING"
    now += SETTLES_AFTER["PREEMPTED"] + 1
    assert judged(runs=2) == "PREEMPTED"


def test_a_job_that_nobody_knows_is_lost_only_after_a_while(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    status = SlurmStatus(print)
    submission = Submission(new_record(rule="base", job_id="7", attempt=1), Request(), tmp_path, tmp_path / "token")
    assert status._judge(submission, None, queue_known=False, past=[]) is None
    assert status._judge(submission, None, queue_known=True, past=[]) is None
    now += SETTLES_AFTER["missing"] + 1
    assert status._judge(submission, None, queue_known=True, past=[]).state == "LOST"
