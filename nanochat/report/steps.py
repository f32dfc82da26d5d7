"""The steps of a trained stage, as its `log.jsonl` tells them.

After a restart a step can stand there twice: training went on from a checkpoint and did it again. The later line is the
one that survives into the model; the earlier one was time spent twice.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.report.read import Run, number, unix_seconds

TRAINED = ("base", "mid", "sft")


@dataclass(frozen=True)
class Step:
    """One optimizer step, as done once."""

    step: int
    loss: float | None
    val_bpb: float | None
    seconds: float | None
    ended: float | None  # unix seconds
    validation_seconds: float
    checkpoint_seconds: float
    tokens_per_second: float | None
    survives: bool = True


def read_steps(run: Run, stage: str) -> list[Step]:
    """All lines in the order in which they were written, replayed ones marked."""
    steps = [step for step in (_step(line) for line in run.lines(f"{stage}/log.jsonl")) if step is not None]
    steps = _merge_validation(steps)
    marked, first_after = [], float("inf")
    # From the end: a step is replaced when anything at or before it was done later.
    for step in reversed(steps):
        marked.append(Step(**{**vars(step), "survives": step.step < first_after}))
        first_after = min(first_after, step.step)
    return marked[::-1]


def surviving(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.survives]


def median_seconds(steps: Sequence[Step]) -> float | None:
    """Of a step; the first ones of each start, which compile, do not move a median."""
    known = [step.seconds for step in steps if step.seconds is not None]
    return statistics.median(known) if known else None


def _step(line: dict[str, Any]) -> Step | None:
    step = number(line.get("step"))
    if step is None or step < 0:
        return None

    def first(*names: str) -> float | None:
        return next((found for found in (number(line.get(name)) for name in names) if found is not None), None)

    times = (unix_seconds(line.get(name)) for name in ("time", "unix_seconds", "ended", "timestamp"))
    return Step(
        step=int(step),
        loss=first("loss", "train_loss"),
        val_bpb=first("val_bpb"),
        seconds=first("seconds", "step_seconds"),
        ended=next((time for time in times if time is not None), None),
        validation_seconds=max(0.0, first("validation_seconds", "val_seconds") or 0.0),
        checkpoint_seconds=max(0.0, first("checkpoint_seconds", "save_seconds") or 0.0),
        tokens_per_second=first("tokens_per_second"),
    )


def _merge_validation(steps: list[Step]) -> list[Step]:
    """A validation that stands on a line of its own, right beside its step, joins that step."""
    merged: list[Step] = []
    for step in steps:
        if merged and merged[-1].step == step.step and step.loss is None:
            last = merged.pop()
            step = Step(
                **{
                    **vars(last),
                    "val_bpb": step.val_bpb if step.val_bpb is not None else last.val_bpb,
                    "validation_seconds": last.validation_seconds + step.validation_seconds,
                    "checkpoint_seconds": last.checkpoint_seconds + step.checkpoint_seconds,
                    "ended": step.ended or last.ended,
                }
            )
        merged.append(step)
    return merged
