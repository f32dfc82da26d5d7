"""The ledger: append-only, newest line of an attempt wins, broken lines do no harm."""

import json

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers, lists, sampled_from, tuples
from snakemake_executor_plugin_submitit.ledger import (
    FIELDS,
    append,
    gpu_hours,
    is_open,
    new_record,
    read_attempts,
)


def test_the_newest_line_of_an_attempt_wins(tmp_path):
    path = tmp_path / "jobs/ledger.jsonl"
    for state in ("PENDING", "RUNNING", "COMPLETED"):
        append(path, new_record(rule="base", job_id="7", attempt=1, state=state))
    append(path, new_record(rule="base", job_id="7", attempt=1, restart=1, state="RUNNING"))
    assert [(r["restart"], r["state"]) for r in read_attempts(path)] == [(0, "COMPLETED"), (1, "RUNNING")]
    assert [is_open(record) for record in read_attempts(path)] == [False, True]


def test_a_line_cut_off_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(path, new_record(rule="a", job_id="1", attempt=1, state="COMPLETED"))
    with open(path, "a") as file:
        file.write('{"rule": "b", "job_id": "2", "att')
    append(path, new_record(rule="c", job_id="3", attempt=1, state="COMPLETED"))
    assert [record["rule"] for record in read_attempts(path)] == ["a", "c"]


@given(junk=lists(binary(max_size=40), max_size=5))
def test_reading_tolerates_any_junk(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(b"\n".join(junk) + b"\n")
    append(path, new_record(rule="a", job_id="1", attempt=1, state="FAILED"))
    assert [record["rule"] for record in read_attempts(path)][-1] == "a"


@given(
    attempts=lists(
        tuples(integers(0, 8), integers(0, 10**6), integers(0, 10**5), sampled_from(["COMPLETED", "PREEMPTED"])),
        max_size=20,
    )
)
def test_gpu_hours_are_the_sum_over_all_attempts(attempts):
    records = [
        new_record(
            rule="base",
            job_id=str(n),
            attempt=1,
            gpus=gpus,
            started=float(start),
            ended=float(start + length),
            state=state,
        )
        for n, (gpus, start, length, state) in enumerate(attempts)
    ]
    charged = [r for r in records if r["started"]]
    assert gpu_hours(records, 0.0) == pytest.approx(
        sum(r["gpus"] * (r["ended"] - r["started"]) for r in charged) / 3600
    )


def test_a_record_has_the_fields_of_the_contract(tmp_path):
    contract = "rule wildcards job_id attempt restart cluster partition nodes gpus gpu_type submitted started ended state reason exit_code"
    assert set(contract.split()) <= set(FIELDS)
    append(tmp_path / "l", new_record(rule="a", job_id="1", attempt=1))
    assert set(json.loads((tmp_path / "l").read_text())) == set(FIELDS)
    with pytest.raises(TypeError, match="no such field: gpu"):
        new_record(gpu=1)
