"""The batch-size plan of a stage: how a step's rows become micro-batches, and what follows when it was too large after all.

The plan that is trained with is the one that the stage `batch_size` made, until a training runs out of memory with it. Then
<out>/plan.json replaces it: fewer rows, foretold from the recorded probes with a larger margin and then measured again. It stays in
force for every later attempt of the stage.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import hardware
from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.progress import say
from nanochat.train.measured import mark_as_too_large
from nanochat.train.search import peak_at

if TYPE_CHECKING:
    from nanochat.train.distributed import World

REPLACEMENT = "plan.json"
MORE_MARGIN = 0.10  # of the device's memory, for each time that training ran out of it
SAME_GPU = 0.97  # two of a kind differ in what the driver keeps for itself
OUT_OF_MEMORY = "cuda_out_of_memory"


def rows_per_step(tokens_per_step: int, sequence_length: int, gpus: int, key: str) -> int:
    """Rows of a step over all ranks. Raises UserError, named by `key` (train.base), unless they split evenly."""
    whole = sequence_length * max(gpus, 1)
    if tokens_per_step % whole:
        below = tokens_per_step // whole * whole
        nearest = " or ".join(str(n) for n in (below, below + whole) if n)
        raise UserError(
            f"config.yaml: {key}.tokens_per_step = {tokens_per_step}: not a multiple of sequence_length x GPUs = "
            f"{sequence_length} x {max(gpus, 1)} = {whole}. Nearest: {nearest}."
        )
    return tokens_per_step // sequence_length


def plan_in_force(
    path: str | Path,
    out: str | Path,
    tokens_per_step: int,
    sequence_length: int,
    ranks: "World",
    measure: Callable[[dict[str, Any]], float | None] = lambda plan: None,
) -> dict[str, Any]:
    """What to train with: the plan at `path`, or the smaller one that replaced it; the same on all ranks.

    measure  peak bytes of a plan's micro-batch as it is now, infinite where it does not run; None where it cannot be measured

    Where a rank has a smaller GPU than the one that was measured, all take as many rows as fit there.
    The executor starts a training that ran out of memory again with ATTEMPT_REASON=cuda_out_of_memory in the environment:
    then a smaller plan is made here, once for such a start however often that job is requeued.
    Raises UserError when the plan is for other sizes, or when no smaller one exists.
    """
    decided: dict[str, Any] | str = ""
    if ranks.leads:
        try:
            decided = _decide(Path(path), Path(out), tokens_per_step, sequence_length, ranks.size, measure)
        except UserError as error:  # the others wait for an answer
            decided = str(error)
    decided = ranks.share(decided)
    if isinstance(decided, str):
        raise UserError(decided)
    return plan_for_capacity(decided, _least_memory_bytes(ranks), ranks.size)


def read_plan(path: str | Path, tokens_per_step: int, sequence_length: int) -> dict[str, Any]:
    """The plan; UserError when it was made for other sizes."""
    plan = read_json(path)
    try:
        made_for = plan["tokens_per_step"], plan["sequence_length"], plan["device_batch_size"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a batch-size plan. Remove it and run the target `batch_size`.") from None
    if made_for[:2] != (tokens_per_step, sequence_length):
        raise UserError(
            f"{path}: made for tokens_per_step = {made_for[0]}, sequence_length = {made_for[1]}; the stage has "
            f"{tokens_per_step}, {sequence_length}. Run the target `batch_size` again."
        )
    return plan


def accumulation(rows: int, ranks: int, device_batch_size: int, path: str | Path) -> int:
    """Micro-batches a rank does in a step of `rows` rows; UserError when they do not divide it."""
    if rows % (ranks * device_batch_size):
        raise UserError(
            f"{path}: device_batch_size = {device_batch_size}: {rows} rows a step are no multiple of {ranks} ranks x "
            f"{device_batch_size}. Run the target `batch_size` again for this number of GPUs."
        )
    return rows // (ranks * device_batch_size)


def smaller_plan(plan: dict[str, Any], times: int, ranks: int) -> dict[str, Any]:
    """The plan after training ran out of memory `times` times: each time a larger margin and fewer rows.

    The largest divisor of a rank's rows whose peak, as the probes tell it, leaves the margin free; without probes, or where
    even one row would not leave it free, the next smaller divisor. Tokens per step stay what they are.
    Raises UserError when there is no smaller divisor.
    """
    size, margin = plan["device_batch_size"], plan.get("margin") or 0.0
    for _ in range(times):
        margin += MORE_MARGIN
        smaller = [n for n in _divisors(plan, ranks) if n < size]
        if not smaller:
            raise UserError(f"{_where(plan)}: out of GPU memory with {size} row a micro-batch. {_remedy(plan)}")
        limit = (plan.get("capacity_bytes") or 0) * (1 - margin)
        size = max((n for n in smaller if _peak(plan, n) is not None and _peak(plan, n) <= limit), default=smaller[-1])
    reason = f"training ran out of memory {times} time(s), at first with {plan['device_batch_size']} rows a micro-batch"
    return _with_rows(plan, size, ranks) | {"margin": margin, "reason": reason}


def confirmed_plan(
    plan: dict[str, Any], ranks: int, measure: Callable[[dict[str, Any]], float | None]
) -> dict[str, Any]:
    """The plan with its peak measured again; with still fewer rows where that does not leave the margin free.

    The last divisor is taken as long as it runs at all. Raises UserError when it does not.
    """
    while (peak := measure(plan)) is not None:
        smaller = [n for n in _divisors(plan, ranks) if n < plan["device_batch_size"]]
        if peak <= plan["capacity_bytes"] * (1 - plan["margin"]) or (not smaller and peak < math.inf):
            return plan | {"peak_bytes": int(peak), "reason": f"{plan['reason']}; measured again"}
        if not smaller:
            raise UserError(f"{_where(plan)}: out of GPU memory with 1 row a micro-batch. {_remedy(plan)}")
        plan = _with_rows(plan, smaller[-1], ranks)
    return plan


def plan_for_capacity(plan: dict[str, Any], capacity_bytes: int | None, ranks: int) -> dict[str, Any]:
    """The plan for a GPU of this much memory: fewer rows where it is smaller than the one that was measured.

    capacity_bytes  None: not on a GPU. Raises UserError when not even one row fits
    """
    measured_bytes, margin = plan.get("capacity_bytes"), plan.get("margin") or 0.0
    if capacity_bytes is None or not measured_bytes or capacity_bytes >= SAME_GPU * measured_bytes:
        return plan
    limit = capacity_bytes * (1 - margin)
    size = max((n for n in _divisors(plan, ranks) if (_peak(plan, n) or 0) <= limit), default=None)
    if size is None:
        raise UserError(f"{_where(plan)}: does not fit in a GPU of {capacity_bytes / 2**30:.1f} GiB. {_remedy(plan)}")
    size = min(size, plan["device_batch_size"])
    reason = f"{plan.get('reason')}; for the smallest GPU of the job, {capacity_bytes / 2**30:.1f} GiB"
    return _with_rows(plan, size, ranks) | {"capacity_bytes": capacity_bytes, "reason": reason}


def _divisors(plan: dict[str, Any], ranks: int) -> list[int]:
    """Rows that a micro-batch may have, ascending."""
    rows = plan["tokens_per_step"] // plan["sequence_length"] // ranks
    return [n for n in range(1, rows + 1) if rows % n == 0]


def _peak(plan: dict[str, Any], size: int) -> float | None:
    """Bytes, from the recorded probes; None without any."""
    peaks = {p["device_batch_size"]: p["peak_bytes"] for p in plan.get("probes") or () if p["ok"] and p["peak_bytes"]}
    return peak_at(size, peaks) if peaks else None


def _with_rows(plan: dict[str, Any], size: int, ranks: int) -> dict[str, Any]:
    rows, peak = plan["tokens_per_step"] // plan["sequence_length"] // ranks, _peak(plan, size)
    sizes = {"device_batch_size": size, "grad_accum_steps": rows // size}
    return plan | sizes | {"peak_bytes": None if peak is None else round(peak)}


def _where(plan: dict[str, Any]) -> str:
    return f"config.yaml: train.{plan.get('stage', 'base')}"


def _remedy(plan: dict[str, Any]) -> str:
    return (
        f"Lower train.{plan.get('stage', 'base')}.sequence_length, model.depth or tokenizer.vocab_size, "
        "or use a GPU with more memory."
    )


def _least_memory_bytes(ranks: "World") -> int | None:
    """Of the ranks' GPUs; None on CPUs."""
    if ranks.device.type != "cuda":
        return None
    import torch

    each = torch.zeros(ranks.size, dtype=torch.float64, device=ranks.device)
    each[ranks.rank] = hardware.memory_capacity_bytes(ranks.device)
    ranks.sum(each)
    return int(each.min())


def summary(plan: dict[str, Any]) -> dict[str, Any]:
    """What a training says about its plan."""
    return {
        name: plan.get(name) for name in ("device_batch_size", "grad_accum_steps", "margin", "source", "reason", "key")
    }


def _decide(
    path: Path,
    out: Path,
    tokens_per_step: int,
    sequence_length: int,
    ranks: int,
    measure: Callable[[dict[str, Any]], float | None],
) -> dict[str, Any]:
    plan, start = read_plan(path, tokens_per_step, sequence_length), _start_after_out_of_memory()
    replacement = out / REPLACEMENT
    made_before = _replacement_of(plan, replacement) or {"times": 0, "starts": []}
    if start is None or start in made_before["starts"]:
        return made_before.get("plan", plan)
    times = max(made_before["times"] + 1, int(os.environ.get("ATTEMPT_REASON_COUNT") or 1))
    failed = made_before.get("plan", plan)
    smaller = confirmed_plan(smaller_plan(plan, times, ranks), ranks, measure)
    content = {"replaces": _digest(plan), "times": times, "starts": [*made_before["starts"], start], "plan": smaller}
    write_json(replacement, content)
    if plan.get("cache"):  # another run of the same sizes shall not start from what failed
        mark_as_too_large(plan["cache"], plan["key"], failed["device_batch_size"])
    say(
        plan.get("stage", "train"),
        f"the attempt before ran out of memory: {smaller['device_batch_size']} rows a micro-batch x "
        f"{smaller['grad_accum_steps']} instead of {failed['device_batch_size']}",
    )
    return smaller


def _start_after_out_of_memory() -> str | None:
    """Names the submission that follows an out-of-memory; None when this one does not.

    A requeued job has the same environment as before, but its attempt before did not run out of memory.
    """
    if os.environ.get("ATTEMPT_REASON") != OUT_OF_MEMORY:
        return None
    # A token is <number>-<job>-<restart>.
    job = "-".join(os.environ.get("ATTEMPT_TOKEN", "").split("-")[1:-1])
    return f"{job or 'by hand'}/{os.environ.get('ATTEMPT_REASON_COUNT') or 1}"


def _replacement_of(plan: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """What stands there, if it replaces this very plan."""
    if not path.exists():
        return None
    content = read_json(path)
    return content if isinstance(content, dict) and content.get("replaces") == _digest(plan) else None


def _digest(plan: dict[str, Any]) -> str:
    """What makes it this plan: all but how long it took to find it."""
    decisive = {
        name: plan.get(name) for name in ("key", "tokens_per_step", "sequence_length", "device_batch_size", "gpus")
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
