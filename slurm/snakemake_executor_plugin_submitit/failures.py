"""What to do about a job that ended without success: the error taxonomy, as one pure function.

Three answers: submit it again without burning one of Snakemake's retries (`resubmit`), let it fail and leave the retry to
Snakemake (`fail`), or let it fail for good, since trying again would end the same way (`give_up`).
"""

from dataclasses import dataclass

from . import exits

# How often one job is submitted again, by kind. A walltime or a preemption with progress has no limit.
LIMITS = {"host_out_of_memory": 3, "node_failure": 3, "cuda_out_of_memory": 3, "lost": 1}
MEMORY_FACTOR = 1.5
GIVE_UP = {
    "user_error",
    "wrong_gpus",
    "loss_not_finite",
    "no_progress",
    "outputs",
    "never_starts",
    "refused",
    "cancelled",
}


class NotReached(ValueError):
    """The cluster has not answered: asking again may help. Any other ValueError of a submission is a refusal."""


@dataclass(frozen=True)
class Decision:
    """`kind` is the class of failure; `memory_factor` and `avoid_nodes` change the next submission's request."""

    action: str  # resubmit, fail, give_up
    kind: str
    why: str
    memory_factor: float = 1.0
    avoid_nodes: bool = False


def decide(
    state: str,
    kind: str | None,
    exit_code: int | None,
    further: bool,
    before: dict[str, int],
    reason: str | None = None,
) -> Decision:
    """The answer to a final state.

    state      a final state of the ledger, not COMPLETED
    kind       what the job's own status file says, None when it could not say anything
    further    whether a training step was reached that the attempt before had not reached
    before     how often this job was already submitted again, by kind
    reason     the scheduler's words
    """
    # However it ended: a command that was cancelled in its first second dies of SIGTERM like any program.
    if state == "CANCELLED" and kind != "host_out_of_memory":
        return Decision("give_up", "cancelled", reason or "it was cancelled")
    if state == "OUT_OF_MEMORY" or kind == "host_out_of_memory":
        return _again(before, "host_out_of_memory", "out of host memory (raise resources.mem_mb)", MEMORY_FACTOR)
    if state == "NODE_FAIL":
        return _again(before, "node_failure", f"node failure{_words(reason)}", avoid_nodes=True)
    if state == "PREEMPTED":
        return Decision("resubmit", "preempted", "preempted, and the site does not requeue")
    if kind == "checkpointed" and further:
        return Decision("resubmit", "checkpointed", "it saved a checkpoint and was stopped")
    if kind == "checkpointed":
        return Decision("give_up", "no_progress", exits.MEANING["no_progress"])
    if state == "TIMEOUT":
        if further:
            return Decision("resubmit", "walltime", "walltime reached, with progress")
        return Decision("give_up", "no_progress", "walltime reached without progress: raise resources.runtime")
    if kind == "cuda_out_of_memory":
        return _again(before, kind, "the GPU ran out of memory")
    if state == "LOST" and kind is None:
        return _again(before, "lost", reason or "it vanished from the queue")
    kind = kind or ("program" if exit_code is None else exits.kind(exit_code))
    why = exits.MEANING.get(kind, kind) + (_words(reason) if kind in ("program", "killed", "never_starts") else "")
    return Decision("give_up" if kind in GIVE_UP else "fail", kind, why)


def _again(before: dict[str, int], kind: str, why: str, factor: float = 1.0, avoid_nodes: bool = False) -> Decision:
    if before.get(kind, 0) >= LIMITS[kind]:
        return Decision("give_up", kind, f"{why}; tried {before[kind] + 1} times")
    return Decision("resubmit", kind, why, factor, avoid_nodes)


def _words(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
