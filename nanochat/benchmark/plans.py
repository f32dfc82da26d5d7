"""Do batch-size plans hold? Searches them, tries the maximum that they name, and trains with them.

d8_t512 ... d20_t2048    one GPU, 524,288 tokens a step; with settings, the one model and length that those name

seconds_cold        the search with empty compilers' caches and nothing measured before
seconds_warm        the same once more: compiled before, measured anew
seconds_cached      the same once more, everything measured before
largest_peak_bytes  of `max_device_batch_size` rows, in a probe as the search makes them; None: they do not run
true_maximum        the rows that fill the limit, by the line through that probe and the largest of the search; maximum_error: how
                    far the named maximum is above it, as a share
maximum_holds       it fits and 3% more does not, or it does not and 3% less does: by one more probe, not by a line
out_of_memory       whether STEPS steps of the trainer with the plan's rows ran out of memory, two micro-steps each, with
                    validations and a checkpoint on the way
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat import command_settings, config, hardware
from nanochat.benchmark import trainer
from nanochat.progress import say
from nanochat.train.batch_size import make_plan
from nanochat.train.prober import EXIT_OUT_OF_MEMORY, DidNotRun, Prober

DEPTHS, LENGTHS = (8, 12, 16, 20), (512, 1024, 2048)
STEPS = {"cuda": 200, "cpu": 4}
VALIDATIONS = 4
TOLERANCE = 0.03  # of the named maximum


def measure(
    settings: command_settings.BenchmarkSettings | None, cases: list[str], steps: int | None, once: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of benchmark/plans.json, one by one, of `cases` alone if there are any. This process makes no CUDA context.

    once  search each plan cold only, and do not try its maximum again: whether training fits is what takes the time then
    """
    gpu = next(iter(hardware.visible_gpus()), None) if settings is None or settings.benchmark.gpus else None
    if settings is None and gpu is None:
        raise trainer.no_gpu("plans")
    for case, wanted in _wanted(settings, gpu):
        if cases and case not in cases:
            continue
        with tempfile.TemporaryDirectory(prefix="nanochat-plans-") as folder:
            row = {"case": case, **_row(wanted, gpu, Path(folder), steps or STEPS["cuda" if gpu else "cpu"], once)}
        ends = "out of memory" if row["out_of_memory"] else f"{row['steps']} steps without running out of memory"
        took = f"searched in {row['seconds_cold']:.0f} s cold"
        say("benchmark plans", f"{case}: {row['device_batch_size']} rows, {took}; {ends}")
        yield row


def _wanted(
    settings: command_settings.BenchmarkSettings | None, gpu: hardware.Gpu | None
) -> Iterable[tuple[str, command_settings.PlanSettings]]:
    common: dict[str, Any] = {"stage": "base", "gpus": 1 if gpu else 0, "device_batch_size": None}
    if settings:
        length = settings.sequence_length
        tokens = trainer.TOKENS_PER_STEP // length * length if gpu else trainer.CPU_ROWS * length
        names = ("vocab_size", "sequence_length", "dtype", "compile")
        common |= {name: getattr(settings, name) for name in names} | {"model": settings.model.resolved()}
        common |= {"tokens_per_step": tokens, "batch_size": config.BatchSize()}
        yield f"d{settings.model.depth}_t{length}", command_settings.PlanSettings(**common)
        return
    common |= {"vocab_size": trainer.VOCAB_SIZE, "tokens_per_step": trainer.TOKENS_PER_STEP, "dtype": "auto"}
    common |= {"compile": "auto", "batch_size": config.BatchSize(max_device_batch_size=2048)}
    for depth in DEPTHS:
        for length in LENGTHS:
            sizes = config.Model(depth=depth).resolved()
            yield f"d{depth}_t{length}", command_settings.PlanSettings(model=sizes, sequence_length=length, **common)


def _row(
    wanted: command_settings.PlanSettings, gpu: hardware.Gpu | None, folder: Path, steps: int, once: bool
) -> dict[str, Any]:
    own = wanted.model_copy(
        update={"batch_size": wanted.batch_size.model_copy(update={"cache": str(folder / "plans")})}
    )
    seconds = dict.fromkeys(("seconds_cold", "seconds_warm", "seconds_cached"))
    searches = (("cold", False), ("warm", False), ("cached", True))
    with _compilers_caches(folder):
        for name, use_cache in searches[:1] if once else searches:
            started = time.monotonic()
            plan = make_plan(own, use_cache)
            seconds[f"seconds_{name}"] = time.monotonic() - started
            say("benchmark plans", f"{name}: {plan['device_batch_size']} rows after {seconds[f'seconds_{name}']:.1f} s")
        # On a CPU memory is no limit: the search ends before it.
        maximum = check_maximum(plan, lambda size: _peak(own, gpu, size)) if gpu and not once else {}
        task = {"model": wanted.model.model_dump(), "vocab_size": wanted.vocab_size, "seed": 1337, "steps": steps}
        task |= {"case": "training", "sequence_length": wanted.sequence_length, "rows": plan["device_batch_size"]}
        task |= {"dtype": wanted.dtype, "compile": wanted.compile, "gpus": wanted.gpus}
        task |= {"tokens_per_step": 2 * plan["device_batch_size"] * wanted.sequence_length}
        task |= {"validate_every_steps": max(1, steps // VALIDATIONS)}
        try:
            trained = trainer.in_processes(task, None)
        except trainer.ProcessFailed as error:
            if error.exit_code != EXIT_OUT_OF_MEMORY:
                raise
            trained = {}
    return {
        "depth": wanted.model.depth,
        "width": wanted.model.width,
        "sequence_length": wanted.sequence_length,
        "vocab_size": wanted.vocab_size,
        "device_batch_size": plan["device_batch_size"],
        "max_device_batch_size": plan["max_device_batch_size"],
        "max_was_probed": plan["max_was_probed"],
        "line_off": plan["line_off"],
        "probes": len(plan["probes"]),
        "peak_bytes": plan["peak_bytes"],
        "capacity_bytes": plan["capacity_bytes"],
        **seconds,
        **(dict.fromkeys(("largest_peak_bytes", "true_maximum", "maximum_error", "maximum_holds")) | maximum),
        "steps": steps,
        "out_of_memory": not trained,
        "trained_peak_bytes": trained.get("peak_memory_bytes"),
        "tokens_per_second": trained.get("tokens_per_second"),
    }


def check_maximum(plan: dict[str, Any], peak: Callable[[int], float]) -> dict[str, Any]:
    """Whether the plan's maximum is one, from two probes. peak: bytes of so many rows, infinite where they do not run."""
    most, limit = plan["max_device_batch_size"], plan["capacity_bytes"] * (1 - plan["margin"])
    largest = peak(most)
    if largest <= limit:
        holds = peak(math.ceil(most * (1 + TOLERANCE))) > limit
    else:
        holds = peak(math.floor(most * (1 - TOLERANCE))) <= limit
    ran = [(one["device_batch_size"], one["peak_bytes"]) for one in plan["probes"] if one["ok"]]
    size, bytes_there = max((one for one in ran if one[0] != most), default=(0, 0))
    if largest == math.inf or not size:
        return {"maximum_holds": holds}
    true = most + (limit - largest) * (most - size) / (largest - bytes_there)
    return {
        "largest_peak_bytes": largest,
        "true_maximum": true,
        "maximum_error": most / true - 1,
        "maximum_holds": holds,
    }


def _peak(settings: command_settings.PlanSettings, gpu: hardware.Gpu | None, size: int) -> float:
    """Bytes of a probe; infinite where it does not run."""
    with Prober(settings, settings.batch_size.probe_timeout_seconds, gpu.uuid if gpu else None, ahead=False) as probe:
        try:
            return probe(size)["peak_bytes"]
        except DidNotRun:
            return math.inf


@contextmanager
def _compilers_caches(folder: Path):
    """Processes started meanwhile keep what they compile below `folder`, and find nothing else."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    before = {name: os.environ.get(name) for name in names}
    os.environ |= {name: str(folder / part) for name, part in names.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
