"""The steps of a trained stage, as its `log.jsonl` tells them.

After a restart a step can stand there twice: training went on from a checkpoint and did it again. The later line is the
one that survives into the model; the earlier one was time spent twice.

A line's `time` is the moment at which its step was done. Until the next step begins come a validation (the line then has
`val_bpb`), a checkpoint, or nothing: where a line does not say what they took, the gap does.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    validation_seconds: float | None  # after the step
    checkpoint_seconds: float | None  # after the step
    session: tuple | None = None  # which process did it, where the log says so
    survives: bool = True


def read_steps(run: Run, stage: str) -> list[Step]:
    """All lines in the order in which they were written, replayed ones marked."""
    steps = [step for step in (_step(line) for line in run.lines(f"{stage}/log.jsonl")) if step is not None]
    steps = _with_gaps(steps)
    marked, first_after = [], float("inf")
    # From the end: a step is replaced when anything at or before it was done later.
    for step in reversed(steps):
        marked.append(replace(step, survives=step.step < first_after))
        first_after = min(first_after, step.step)
    return marked[::-1]


def surviving(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.survives]


def median_seconds(steps: Sequence[Step]) -> float | None:
    """Of a step; the first ones of each start, which compile, do not move a median."""
    known = [step.seconds for step in steps if step.seconds is not None]
    return statistics.median(known) if known else None


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean over the `width` values on either side, fewer at the start: nothing is shifted.

    At the end the line through the last of them, for a mean over fewer and fewer would end in one raw value.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    found = []
    for index in range(len(values)):
        reach = min(width, index, len(values) - 1 - index)
        found.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    last = values[-(2 * width + 1) :]
    if width and len(last) == 2 * width + 1:
        mean = sum(last) / len(last)
        slope = sum((x - width) * y for x, y in enumerate(last)) / sum((x - width) ** 2 for x in range(len(last)))
        found[-width:] = [mean + slope * x for x in range(1, width + 1)]
    return found


def _step(line: dict[str, Any]) -> Step | None:
    step = number(line.get("step"))
    if step is None or step < 0:
        return None

    loss, seconds = number(line.get("loss")), number(line.get("seconds"))
    session = (str(line.get("attempt")), str(line.get("restart")))
    return Step(
        step=int(step),
        loss=loss,
        val_bpb=number(line.get("val_bpb")),
        seconds=None if seconds is None else max(0.0, seconds),
        ended=unix_seconds(line.get("time")),
        validation_seconds=number(line.get("validation_seconds")),
        checkpoint_seconds=number(line.get("checkpoint_seconds")),
        session=session if "attempt" in line or "restart" in line else None,
    )


def _with_gaps(steps: Sequence[Step]) -> list[Step]:
    """Fill in what validations and checkpoints took, from the time until the next step of the same process began.

    The last step of a process has no next one: it is given what the others took, at the median.
    """
    gaps: list[float | None] = []
    for index, one in enumerate(steps):
        gap, following = None, steps[index + 1] if index + 1 < len(steps) else None
        same = following is not None and one.session is not None and one.session == following.session
        if same and following.step == one.step + 1 and None not in (one.ended, following.ended, following.seconds):
            gap = max(0.0, following.ended - following.seconds - one.ended)
        gaps.append(gap)

    def usual(validates: bool) -> float:
        known = [
            g for one, g in zip(steps, gaps, strict=True) if g is not None and (one.val_bpb is not None) == validates
        ]
        return statistics.median(known) if known else 0.0

    validation, bookkeeping = usual(True), usual(False)
    filled = []
    for one, gap in zip(steps, gaps, strict=True):
        validates = one.val_bpb is not None
        took, saved = one.validation_seconds, one.checkpoint_seconds
        if took is None:
            took = (validation if gap is None else gap) if validates else 0.0
        if saved is None:
            # Between two steps without a checkpoint there is only a log line to write.
            is_save = not validates and gap is not None and gap > 4 * bookkeeping + 0.02
            saved = gap if is_save else 0.0
        filled.append(replace(one, validation_seconds=max(0.0, took), checkpoint_seconds=max(0.0, saved)))
    return filled
