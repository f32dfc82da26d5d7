"""Decoding with and without a cache of keys and values, over batch sizes.

recompute_eager     the study's "without": every new token runs the whole row through the model again
recompute_compiled  the same with compiled blocks
cache_eager         the engine with torch's operations, its steps launched kernel by kernel
cache_graph         the engine as it runs on a GPU: its kernels, captured in CUDA graphs
transformers_...    other libraries, see `peers`

`outputs_equal` holds each case's greedy tokens against a single causal pass over them: what recomputation would have chosen
at every place. `floor_fraction` is the time that reading the matmul weights once and the filled cache takes at the measured
copy bandwidth, over the time of a step.
"""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from nanochat.benchmark import peers
from nanochat.benchmark.roofline import Rates, cached_step, recomputed_step, weight_bytes
from nanochat.benchmark.timing import repeat, seconds_of, spread
from nanochat.config import Benchmark
from nanochat.errors import UserError
from nanochat.hardware import GpuUtilization
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.model.gpt import GPT
from nanochat.progress import say

# By how much, in logits, the cache's choice may be worse than recomputation's. bfloat16 has 8 bits: logits between 8 and 15
# are 1/16 apart, and the hidden state that they come from was rounded in every layer.
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
# Lengths at which recomputation is timed: all of them would be the square of the others' time.
TIMED_LENGTHS = 4
# Steps of a launch-bound case that are timed, around the middle of the generation.
TIMED_STEPS = 16
CHECKED_ROWS = 16  # whose tokens are held against a full pass
MEASURED = ("tokens_per_second", "ms_per_step", "floor_fraction", "outputs_equal", "predicted_tokens_per_second")
BUDGET_SECONDS = {"cuda": 5.0, "cpu": 1.5}  # of the repetitions of one case at one batch size
OWN_CASES = ("recompute_eager", "cache_eager", "cache_graph")
CASES = (*OWN_CASES, "recompute_compiled", *peers.CASES)
CASE_SECONDS = 60.0  # of one case over all batch sizes; sizes that it does not reach are marked as not run

Run = Callable[[list[list[int]]], dict]


def measure(
    model: GPT,
    settings: Benchmark,
    prompts: list[list[int]],
    rates: Rates,
    compile: bool,
    only: Collection[str] = (),
) -> Iterator[dict]:
    """This package's rows of benchmark/kv_cache.json.

    prompts  at least as many as the largest batch size
    only     of the cases these alone; empty: all
    """
    on_gpu = model.device.type == "cuda"
    cases: dict[str, Run] = {}
    cases["recompute_eager"] = lambda batch: _recompute_row(model, batch, settings, rates)
    if compile:
        cases["recompute_compiled"] = lambda batch: _recompute_row(model, batch, settings, rates)
    cases["cache_eager"] = lambda batch: _stepwise_row(model, batch, settings, rates)
    if on_gpu:
        cases["cache_graph"] = lambda batch: _whole_row(model, batch, settings, rates)
    for case, run in cases.items():
        if only and case not in only:
            continue
        with compiled_blocks(model) if case == "recompute_compiled" else _nothing():
            yield from _over_sizes(case, run, settings, prompts)


def measure_peers(
    model: GPT, settings: Benchmark, prompts: list[list[int]], rates: Rates, only: Collection[str] = ()
) -> Iterator[dict]:
    """The rows of other libraries, of each that is installed; a word on each that is not. only: as in `measure`."""
    for case, run in peers.cases(model, settings.new_tokens).items():
        if only and case not in only:
            continue
        if isinstance(run, str):
            say("benchmark kv_cache", f"{case}: {run}")
            yield {"case": case, "batch_size": None, "skipped": run} | dict.fromkeys(MEASURED)
            continue
        measured = partial(_peer_row, run, model, settings=settings, rates=rates)
        yield from _over_sizes(case, measured, settings, prompts)


def _over_sizes(case: str, run: Run, settings: Benchmark, prompts: list[list[int]]) -> Iterator[dict]:
    """One case at each batch size, until its time is used up."""
    started = time.monotonic()
    for batch_size in settings.batch_sizes:
        head = {"case": case, "batch_size": batch_size}
        gc.collect()
        try:
            if (spent := time.monotonic() - started) > CASE_SECONDS:
                raise UserError(f"not run: the smaller sizes took {spent:.0f} s, of {CASE_SECONDS:.0f} s for this case")
            row = head | run(prompts[:batch_size])
        except Exception as error:
            # A size that does not fit, or another library that fails, leaves the others their measurement. A fault of this package
            # is no such thing.
            if case in OWN_CASES and not isinstance(error, UserError | torch.OutOfMemoryError):
                raise
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            row = head | dict.fromkeys(MEASURED) | {"skipped": why.splitlines()[0][:300]}
        rate = row["tokens_per_second"]
        say(
            "benchmark kv_cache", f"{case}, {batch_size} rows: " + (f"{rate:,.0f} tokens/s" if rate else row["skipped"])
        )
        yield row


@contextmanager
def compiled_blocks(model: GPT) -> Iterator[None]:
    """Blocks compiled while this lasts: all of them share one compilation, and so do all rows and lengths but a single row."""
    # Sizes that change are made variable at their second value; the limit is for the few shapes that are not.
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in model.blocks:
            block._compiled_call_impl = None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@torch.no_grad()
def last_choice(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The most probable next token of each row (B, T) -> (B,), from scratch."""
    return model(tokens, last_only=True)[:, -1].argmax(-1)


def _recompute_row(model: GPT, prompts: list[list[int]], settings: Benchmark, rates: Rates) -> dict:
    """Timed at some lengths between the first and the last; a step costs their mean."""
    first, count = len(prompts[0]), min(TIMED_LENGTHS, settings.new_tokens)
    lengths = [first + round(i * (settings.new_tokens - 1) / max(1, count - 1)) for i in range(count)]
    budget = BUDGET_SECONDS[model.device.type] / count
    medians, spreads = [], []
    with GpuUtilization(model.device, every_seconds=0.02) as utilization:
        for length in lengths:
            tokens = torch.tensor(prompts, device=model.device)
            tokens = torch.cat([tokens, tokens.new_zeros(len(prompts), length - first)], dim=1)
            seconds = repeat(lambda tokens=tokens: last_choice(model, tokens), model.device, 5, budget)
            medians.append(statistics.median(seconds))
            spreads.append(spread(seconds))
    step_seconds = statistics.mean(medians)
    chosen = [[token] for token in last_choice(model, torch.tensor(prompts, device=model.device)).tolist()]
    with torch.compiler.set_stance("force_eager"):
        difference = first_difference(model, prompts[:CHECKED_ROWS], chosen[:CHECKED_ROWS])
    predicted = statistics.mean(recomputed_step(model, len(prompts), length).seconds(rates) for length in lengths)
    return {
        "tokens_per_second": len(prompts) / step_seconds,
        "ms_per_step": 1000 * step_seconds,
        "floor_fraction": weight_bytes(model) / rates.copy_bytes_per_second / step_seconds,
        **_held_against_a_pass(model, difference),
        "predicted_tokens_per_second": len(prompts) / predicted,
        "spread": statistics.median(spreads),
        "timed_lengths": count,
        "gpu_utilization": utilization.mean,
    }


def _stepwise_row(model: GPT, prompts: list[list[int]], settings: Benchmark, rates: Rates) -> dict:
    """Prefill and some steps around the middle are timed: launched one by one, all of them would take minutes."""
    new, device = settings.new_tokens, model.device
    steps = min(TIMED_STEPS, new - 1)
    engine = Engine(model, rows=len(prompts), length=len(prompts[0]) + new, graphs=False, kernels=False)
    engine.burst = steps
    middle = [prompt + prompt[:1] * ((new - steps) // 2) for prompt in prompts]
    short, long = [Request(prompt, 1) for prompt in middle], [Request(prompt, 1 + steps) for prompt in middle]
    budget = BUDGET_SECONDS[device.type] / 3
    whole_prompts = [Request(prompt, 1) for prompt in prompts]
    prefill = statistics.median(repeat(lambda: engine.generate(whole_prompts), device, 3, budget))
    begun = statistics.median(repeat(lambda: engine.generate(short), device, 3, budget))
    with GpuUtilization(device, every_seconds=0.02) as utilization:
        seconds = repeat(lambda: engine.generate(long), device, 3, budget)
    step_seconds = max(statistics.median(seconds) - begun, 1e-9) / steps
    ids = [completion.ids for completion in engine.generate(long)]
    timing = {
        "timed_steps": steps,
        "spread": spread(seconds),
        "prefill_ms": 1000 * prefill,
        "gpu_utilization": utilization.mean,
    }
    return (
        _cached(model, prompts, settings, rates, prefill + (new - 1) * step_seconds, step_seconds, middle, ids) | timing
    )


def _whole_row(model: GPT, prompts: list[list[int]], settings: Benchmark, rates: Rates) -> dict:
    """The whole generation is timed, prefill included; a step costs what is left of it without the prefill."""
    new, device = settings.new_tokens, model.device
    engine = Engine(model, rows=len(prompts), length=len(prompts[0]) + new)
    requests, first = [Request(prompt, new) for prompt in prompts], [Request(prompt, 1) for prompt in prompts]
    captured = seconds_of(lambda: engine.generate(requests), device)
    ids = [completion.ids for completion in engine.generate(requests)]
    budget = BUDGET_SECONDS[device.type]
    with GpuUtilization(device, every_seconds=0.02) as utilization:
        seconds = repeat(lambda: engine.generate(requests), device, 10, budget, warmup=0)
    prefill = statistics.median(repeat(lambda: engine.generate(first), device, 5, budget))
    total = statistics.median(seconds)
    timing = {
        "spread": spread(seconds),
        "prefill_ms": 1000 * prefill,
        "first_run_seconds": captured,
        "gpu_utilization": utilization.mean,
    }
    return _cached(model, prompts, settings, rates, total, (total - prefill) / max(1, new - 1), prompts, ids) | timing


def _peer_row(run: peers.Run, model: GPT, prompts: list[list[int]], settings: Benchmark, rates: Rates) -> dict:
    """Another library's generation. Its weights are its own, so there are no outputs to compare; its prefill and steps are one call,
    so its time is not one of a step."""
    new = settings.new_tokens
    with GpuUtilization(model.device, every_seconds=0.02) as utilization:
        seconds = repeat(lambda: run(prompts), model.device, 3, BUDGET_SECONDS[model.device.type])
    total = statistics.median(seconds)
    row = _cached(model, prompts, settings, rates, total, total / new, [], [])
    timing = {"spread": spread(seconds), "gpu_utilization": utilization.mean}
    unknown = ("ms_per_step", "floor_fraction", "outputs_equal", "first_difference", "within_tolerance")
    return row | dict.fromkeys(unknown) | timing


def _cached(
    model: GPT,
    prompts: list[list[int]],
    settings: Benchmark,
    rates: Rates,
    total: float,
    step: float,
    continued: list[list[int]],
    ids: list[list[int]],
) -> dict:
    """What a row with a cache says, from the seconds of a generation and of a step, and `ids` that continue `continued`."""
    new, rows = settings.new_tokens, len(prompts)
    cost = cached_step(model, rows, len(prompts[0]) + new / 2)
    predicted = recomputed_step(model, rows, len(prompts[0])).seconds(rates) + (new - 1) * cost.seconds(rates)
    difference = first_difference(model, continued[:CHECKED_ROWS], ids[:CHECKED_ROWS])
    return {
        "tokens_per_second": rows * new / total,
        "ms_per_step": 1000 * step,
        "floor_fraction": cost.bytes / rates.copy_bytes_per_second / step if step > 0 else None,
        **_held_against_a_pass(model, difference),
        "predicted_tokens_per_second": rows * new / predicted,
    }


def _held_against_a_pass(model: GPT, difference: dict | None) -> dict:
    close = difference is None or difference["margin"] <= LOGIT_TOLERANCE[model.compute_dtype]
    return {"outputs_equal": difference is None, "first_difference": difference, "within_tolerance": close}


@torch.no_grad()
def first_difference(model: GPT, prompts: list[list[int]], generated: list[list[int]]) -> dict | None:
    """Where greedy decoding first chose another token than a causal pass without a cache would have; None: nowhere.

    {row, position (of the new token), margin (by how much, in logits, the pass prefers its own)}. In bfloat16 a near tie can
    go either way; the margin tells such a tie from a fault.
    """
    worst: dict | None = None
    for row, (prompt, new) in enumerate(zip(prompts, generated, strict=True)):
        tokens = torch.tensor([prompt + new[:-1]], device=model.device)
        logits = model(tokens)[0, len(prompt) - 1 :]  # (new, V)
        chosen = torch.tensor(new, device=model.device)
        wrong = (logits.argmax(-1) != chosen).nonzero()
        if len(wrong) and (worst is None or int(wrong[0]) < worst["position"]):
            at = int(wrong[0])
            margin = float(logits[at].max() - logits[at, chosen[at]])
            worst = {"row": row, "position": at, "margin": margin}
    return worst
