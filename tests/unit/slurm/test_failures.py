"""Failures by kind: what is submitted again, what is left to Snakemake's retries, what is given up."""

import pytest
from snakemake_executor_plugin_submitit.failures import LIMITS, decide


@pytest.mark.parametrize(
    ("state", "kind", "code", "further", "action", "class_"),
    [
        ("FAILED", "program", 1, False, "fail", "program"),
        ("FAILED", "user_error", 2, False, "give_up", "user_error"),
        ("FAILED", "loss_not_finite", 87, False, "give_up", "loss_not_finite"),
        ("FAILED", "wrong_gpus", 78, False, "give_up", "wrong_gpus"),
        ("FAILED", "cuda_out_of_memory", 86, True, "resubmit", "cuda_out_of_memory"),
        ("FAILED", "checkpointed", 85, True, "resubmit", "checkpointed"),
        ("FAILED", "checkpointed", 85, False, "give_up", "no_progress"),
        ("FAILED", "no_progress", 85, False, "give_up", "no_progress"),
        ("FAILED", "host_out_of_memory", None, False, "resubmit", "host_out_of_memory"),
        ("OUT_OF_MEMORY", "killed", 137, False, "resubmit", "host_out_of_memory"),
        ("TIMEOUT", None, None, True, "resubmit", "walltime"),
        ("TIMEOUT", None, None, False, "give_up", "no_progress"),
        ("TIMEOUT", "checkpointed", 85, True, "resubmit", "checkpointed"),
        ("NODE_FAIL", None, None, False, "resubmit", "node_failure"),
        ("PREEMPTED", "checkpointed", 85, True, "resubmit", "preempted"),
        ("CANCELLED", None, None, False, "give_up", "cancelled"),
        ("CANCELLED", "checkpointed", 85, True, "give_up", "cancelled"),
        ("CANCELLED", "program", 143, False, "give_up", "cancelled"),
        ("CANCELLED", "host_out_of_memory", 137, False, "resubmit", "host_out_of_memory"),
        ("LOST", None, None, False, "resubmit", "lost"),
    ],
)
def test_each_end_has_its_answer(state, kind, code, further, action, class_):
    decision = decide(state, kind, code, further, {})
    assert (decision.action, decision.kind) == (action, class_)


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_what_does_not_help_is_given_up(kind):
    state = {"host_out_of_memory": "OUT_OF_MEMORY", "node_failure": "NODE_FAIL", "lost": "LOST"}.get(kind, "FAILED")
    told = kind if state == "FAILED" else None
    assert decide(state, told, None, False, {kind: LIMITS[kind] - 1}).action == "resubmit"
    assert decide(state, told, None, False, {kind: LIMITS[kind]}).action == "give_up"


def test_the_next_submission_differs():
    assert decide("OUT_OF_MEMORY", None, None, False, {}).memory_factor > 1
    assert decide("NODE_FAIL", None, None, False, {}).avoid_nodes
