"""Measure how many rows a micro-batch should have, for base, mid or sft.

Reads  --config  results/config/batch_size_<stage>.json
Writes --out     results/batch_size/<stage>.json: the plan that the stage trains with

Every probe trains for real, in a fresh process. Two predict how many rows fit in (1 - margin) of the memory; the largest
divisor of a step's rows that fits is measured, since tokens per step must stay as configured. Of the largest that fit the
fastest is taken, the smaller one where they are surely within 1%; where the smallest of them is the fastest, smaller ones are
tried too. On a CPU memory is no limit and large batches fall out of the cache: growth ends where it no longer pays.

With several GPUs one of them is measured, the one with the least memory among those that are visible, with room left for what
communication takes; should the training get a smaller GPU after all, its ranks agree on fewer rows before they begin.

What was measured is kept: stages of one model and sequence length share their probes, whatever their tokens per step.
"""

import argparse
import math
import time
from dataclasses import asdict
from typing import Any

from nanochat import command_settings, hardware
from nanochat.errors import UserError
from nanochat.files import read_settings, write_json
from nanochat.progress import say
from nanochat.train.measured import OUT_OF_MEMORY, Measured, cache_key
from nanochat.train.plan import rows_per_step
from nanochat.train.prober import OUT_OF_HOST_MEMORY, TOO_SLOW, DidNotRun, Prober
from nanochat.train.search import Found, Probe, search, search_while_it_pays

# That a probe is timed for at least: half a second gave rates of one size up to 3.4% apart on an H100.
GPU_SECONDS = 2.0
CPU_FIRST_TOKENS = 1024  # smaller micro-batches than this never won on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--out", required=True, help="plan to write (JSON)")
    parser.add_argument("--no-cache", action="store_true", help="measure even if this was measured before")


def run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments.config, command_settings.PlanSettings)
    write_json(arguments.out, make_plan(settings, use_cache=not arguments.no_cache))


def make_plan(settings: command_settings.PlanSettings, use_cache: bool = True) -> dict[str, Any]:
    """The plan: from the settings, from what was measured before, or from a measurement, in this order.

    It makes no CUDA context and does not import torch: the probes' processes have the GPU to themselves, and a plan that was
    measured before is there at once.
    """
    started = time.monotonic()
    stage, own, ranks = settings.stage, settings.batch_size, max(settings.ranks, settings.gpus)
    rows = rows_per_step(settings.tokens_per_step, settings.sequence_length, ranks, f"train.{stage}") // ranks
    if settings.device_batch_size:
        return _plan(settings, rows, settings.device_batch_size, "override", started)
    gpu = _smallest_gpu(settings)
    capacity = gpu.memory_bytes if gpu else hardware.host_memory_bytes()
    key = cache_key(settings, gpu)
    tell = lambda message: say("batch_size", message)  # noqa: E731
    measured = Measured.load(own.cache, key, use_cache, tell)
    found = _search(settings, rows, capacity, measured, gpu)
    if found.chosen is None and not measured.is_new and _smallest(found).note == OUT_OF_MEMORY:
        tell(
            f"{measured.path}: one row ran out of memory then; another process may have been on the GPU: measuring again"
        )
        measured = Measured.load(own.cache, key, False, tell)
        found = _search(settings, rows, capacity, measured, gpu)
    if found.chosen is None:
        raise _nothing_fits(settings, capacity, _smallest(found).note)
    source = "measured" if measured.is_new else "cache"
    plan = _plan(settings, rows, found.chosen.device_batch_size, source, started) | {
        "max_device_batch_size": found.largest,
        "max_was_probed": found.largest_was_probed,
        "line_off": found.off,
        "capacity_bytes": capacity,
        "peak_bytes": found.chosen.peak_bytes,
        "probes": [asdict(one) for one in sorted(found.probes, key=lambda one: one.device_batch_size)],
        "reason": found.reason,
        "key": key,
        "cache": str(measured.path) if measured.path else None,
        "device": gpu.name if gpu else hardware.cpu_name(),
        "decode": _decode(settings, capacity, measured),
        "settings": settings.model_dump(mode="json"),  # to measure again, should training run out of memory after all
    }
    say(
        "batch_size",
        f"{stage}: {plan['device_batch_size']} rows x {plan['grad_accum_steps']} ({source}): {found.reason}",
    )
    return plan


def _smallest(found: Found) -> Probe:
    return min(found.probes, key=lambda one: one.device_batch_size)


def _nothing_fits(settings: command_settings.PlanSettings, capacity: int, note: str | None) -> UserError:
    """note  why the smallest probe did not run"""
    stage, own = settings.stage, settings.batch_size
    row = f"config.yaml: train.{stage}: not even one row of sequence_length = {settings.sequence_length}"
    smaller = f"ower train.{stage}.sequence_length, model.depth or tokenizer.vocab_size."
    if note == OUT_OF_HOST_MEMORY:
        memory = f"{hardware.host_memory_bytes() / 2**30:.1f} GiB"
        return UserError(
            f"{row} can be tried in the job's memory, {memory}. Give it more (mem_mb in the profile), or l{smaller}"
        )
    if note and note.startswith(TOO_SLOW):
        limit = f"batch_size.probe_timeout_seconds = {own.probe_timeout_seconds:g}"
        return UserError(f"{row} was measured within {limit}. Raise it, or l{smaller}")
    share = f"{1 - own.margin:.0%} of {capacity / 2**30:.1f} GiB"
    return UserError(f"{row} fits in {share} ({note or 'too large'}). L{smaller}")


def measure_again(plan: dict[str, Any], gpu_index: int | None) -> float | None:
    """Peak bytes of a plan's micro-batch, in a process of its own beside the training that waits for it.

    gpu_index  which of the visible GPUs; None on a CPU
    returns    infinite where it does not run; None for a plan that was given and not measured
    """
    if not plan.get("settings"):
        return None
    settings = command_settings.PlanSettings(**plan["settings"])
    uuid = None if gpu_index is None else hardware.visible_gpus()[gpu_index].uuid
    with Prober(settings, settings.batch_size.probe_timeout_seconds, uuid, ahead=False) as probe:
        try:
            return probe(plan["device_batch_size"])["peak_bytes"]
        except DidNotRun:
            return math.inf


def _search(
    settings: command_settings.PlanSettings, rows: int, capacity: int, measured: Measured, gpu: hardware.Gpu | None
) -> Found:
    """Search among the divisors of a step's rows, with what is known already."""
    own, length = settings.batch_size, settings.sequence_length
    with Prober(settings, own.probe_timeout_seconds, gpu.uuid if gpu else None) as prober:

        def probe(size: int) -> Probe:
            started = time.monotonic()
            try:
                measured.ran(size, prober(size, GPU_SECONDS if gpu else 0.0), time.monotonic() - started)
            except DidNotRun as error:
                measured.did_not_run(size, str(error), time.monotonic() - started)
            one = measured.probe(size, rows, length)
            memory = f"{one.peak_bytes / 2**30:.1f} of {capacity / 2**30:.1f} GiB" if one.ok else one.note
            speed = f"{one.tokens_per_second:,.0f} tokens/s, " if one.ok else ""
            say("batch_size", f"{settings.stage}: {size} rows: {speed}{memory}, {one.seconds:.0f} s")
            return one

        candidates = [n for n in range(1, own.max_device_batch_size + 1) if rows % n == 0]
        known = [measured.probe(size, rows, length) for size in measured.sizes]
        limit = int(capacity * (1 - own.margin))
        if gpu is None:
            return search_while_it_pays(probe, candidates, limit, -(-CPU_FIRST_TOKENS // length), known)
        return search(probe, candidates, limit, own.max_device_batch_size, _guess(settings, limit), known)


def _guess(settings: command_settings.PlanSettings, limit: int) -> int:
    """Rows that might fit, from the sizes alone."""
    model = settings.model
    parameters = hardware.parameter_count(model, settings.vocab_size)
    itemsize = 4 if settings.dtype == "float32" else 2

    def bytes_of(rows: int) -> float:
        tokens, compiled = rows * settings.sequence_length, settings.compile != "off"
        return hardware.training_bytes(parameters, model.depth, model.width, tokens, itemsize, compiled)

    return max(1, int((limit - bytes_of(0)) / (bytes_of(1) - bytes_of(0))))


def _smallest_gpu(settings: command_settings.PlanSettings) -> hardware.Gpu | None:
    """The visible GPU with the least memory; None where the stage trains on the CPU."""
    if not settings.gpus:
        return None
    gpus = hardware.visible_gpus()
    if not gpus:
        raise hardware.no_gpu(settings.gpus)
    return min(gpus, key=lambda gpu: gpu.memory_bytes)


def _decode(settings: command_settings.PlanSettings, capacity: int, measured: Measured) -> dict[str, Any]:
    """How many rows of a training row's length can be decoded side by side in the same share of the memory."""
    itemsize = {"float32": 4, "bfloat16": 2}[measured.dtype]
    sizes, length = settings.model, settings.sequence_length
    weights = hardware.parameter_count(sizes, settings.vocab_size) * itemsize
    memory = int(capacity * (1 - settings.batch_size.margin)) - weights - measured.beside_bytes
    return {
        "sequence_length": length,
        "rows": hardware.decode_rows(sizes, settings.vocab_size, length, itemsize, memory),
        "row_bytes": hardware.kv_cache_bytes(sizes, length, itemsize),
        "weight_bytes": weights,
        "memory_bytes": memory,
        "dtype": measured.dtype,
    }


def _plan(settings: command_settings.PlanSettings, rows: int, size: int, source: str, started: float) -> dict[str, Any]:
    if rows % size:
        nearest = [n for n in range(1, rows + 1) if rows % n == 0]
        raise UserError(
            f"config.yaml: train.{settings.stage}.device_batch_size = {size}: does not divide the {rows} rows that a GPU "
            f"sees in a step. One of {', '.join(map(str, nearest))} would."
        )
    return {
        "stage": settings.stage,
        "device_batch_size": size,
        "grad_accum_steps": rows // size,
        "tokens_per_step": settings.tokens_per_step,
        "sequence_length": settings.sequence_length,
        "gpus": settings.gpus,
        "max_device_batch_size": None,
        "capacity_bytes": None,
        "peak_bytes": None,
        "margin": settings.batch_size.margin,
        "probes": [],
        "reason": "set in the configuration",
        "key": None,
        "seconds": time.monotonic() - started,
        "source": source,
    }
