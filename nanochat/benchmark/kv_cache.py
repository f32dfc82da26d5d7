"""Decoding with and without a cache of keys and values, over batch sizes.

recompute_eager     the study's "without": every new token runs the whole row through the model again
recompute_compiled  the same, compiled once for all lengths
cache_eager         the engine, its steps launched kernel by kernel
cache_graph         the engine as it runs on a GPU: steps captured in a CUDA graph, kernels fused where a compiler works

`outputs_equal` holds each case's greedy tokens against a single causal pass over them: what recomputation would have chosen
at every place. `floor_fraction` is the time that reading the matmul weights once and the filled cache takes at the measured
copy bandwidth, over the time of a step.
"""

import statistics
from collections.abc import Callable

import torch

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
TIMED_LENGTHS = 8
MEASURED = ("tokens_per_second", "ms_per_step", "floor_fraction", "outputs_equal", "predicted_tokens_per_second")
BUDGET_SECONDS = {"cuda": 10.0, "cpu": 1.5}  # of one case at one batch size


def measure(model: GPT, settings: Benchmark, prompts: list[list[int]], rates: Rates, compile: bool) -> list[dict]:
    """The rows of benchmark/kv_cache.json; `prompts` holds at least as many as the largest batch size."""
    cases: dict[str, Callable[[list[list[int]]], dict]] = {}
    cases["recompute_eager"] = lambda batch: _recompute_row(last_choice, model, batch, settings, rates)
    if compile:
        compiled = torch.compile(last_choice, dynamic=True)
        cases["recompute_compiled"] = lambda batch: _recompute_row(compiled, model, batch, settings, rates)
    cases["cache_eager"] = lambda batch: _cache_row(model, batch, settings, rates, graphs=False, compile=False)
    if model.device.type == "cuda":
        cases["cache_graph"] = lambda batch: _cache_row(model, batch, settings, rates, graphs=True, compile=compile)
    rows = []
    for batch_size in settings.batch_sizes:
        rates_here = []
        for case, run in cases.items():
            head = {"case": case, "batch_size": batch_size}
            try:
                rows.append(head | run(prompts[:batch_size]))
            except (UserError, torch.OutOfMemoryError) as error:
                # One size that does not fit leaves the others their measurement.
                rows.append(head | dict.fromkeys(MEASURED) | {"skipped": str(error).splitlines()[0]})
                continue
            rates_here.append(f"{case} {rows[-1]['tokens_per_second']:,.0f}")
        say("benchmark kv_cache", f"{batch_size} rows: tokens/s " + ", ".join(rates_here))
    return rows


@torch.no_grad()
def last_choice(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The most probable next token of each row (B, T) -> (B,), from scratch."""
    return model(tokens, last_only=True)[:, -1].argmax(-1)


def _recompute_row(step, model: GPT, prompts: list[list[int]], settings: Benchmark, rates: Rates) -> dict:
    """Timed at some lengths between the first and the last; a step costs their mean."""
    first, count = len(prompts[0]), min(TIMED_LENGTHS, settings.new_tokens)
    lengths = [first + round(i * (settings.new_tokens - 1) / max(1, count - 1)) for i in range(count)]
    budget = BUDGET_SECONDS[model.device.type] / count
    medians, spreads = [], []
    for length in lengths:
        tokens = torch.tensor(prompts, device=model.device)
        tokens = torch.cat([tokens, tokens.new_zeros(len(prompts), length - first)], dim=1)
        seconds = repeat(lambda tokens=tokens: step(model, tokens), model.device, 5, budget)
        medians.append(statistics.median(seconds))
        spreads.append(spread(seconds))
    step_seconds = statistics.mean(medians)
    predicted = statistics.mean(recomputed_step(model, len(prompts), length).seconds(rates) for length in lengths)
    return {
        "tokens_per_second": len(prompts) / step_seconds,
        "ms_per_step": 1000 * step_seconds,
        "floor_fraction": weight_bytes(model) / rates.copy_bytes_per_second / step_seconds,
        "outputs_equal": True,
        "first_difference": None,
        "within_tolerance": True,
        "predicted_tokens_per_second": len(prompts) / predicted,
        "spread": statistics.median(spreads),
        "timed_lengths": count,
        "gpu_utilization": None,
    }


def _cache_row(
    model: GPT,
    prompts: list[list[int]],
    settings: Benchmark,
    rates: Rates,
    graphs: bool,
    compile: bool,
) -> dict:
    """The whole generation is timed, prefill included; a step costs what is left of it without the prefill."""
    new = settings.new_tokens
    length = len(prompts[0]) + new
    # Compiled, one bucket is enough: each costs a compilation.
    engine = Engine(
        model,
        rows=len(prompts),
        length=length,
        graphs=graphs,
        compile=compile,
        shortest_bucket=length if compile else 64,
    )
    requests = [Request(prompt, new) for prompt in prompts]
    budget = BUDGET_SECONDS[model.device.type]
    compile_seconds = seconds_of(lambda: engine.generate(requests), model.device)
    completions = engine.generate(requests)
    with GpuUtilization(model.device, every_seconds=0.02) as utilization:
        seconds = repeat(lambda: engine.generate(requests), model.device, 5, budget, warmup=0)
    first = [Request(prompt, 1) for prompt in prompts]
    prefill = statistics.median(repeat(lambda: engine.generate(first), model.device, 3, budget))
    total = statistics.median(seconds)
    step_seconds = (total - prefill) / max(1, new - 1)
    cost = cached_step(model, len(prompts), len(prompts[0]) + new / 2)
    predicted = recomputed_step(model, len(prompts), len(prompts[0])).seconds(rates) + (new - 1) * cost.seconds(rates)
    difference = first_difference(model, prompts, [completion.ids for completion in completions])
    return {
        "tokens_per_second": len(prompts) * new / total,
        "ms_per_step": 1000 * step_seconds,
        "floor_fraction": cost.bytes / rates.copy_bytes_per_second / step_seconds if step_seconds > 0 else None,
        "outputs_equal": difference is None,
        "first_difference": difference,
        "within_tolerance": difference is None or difference["margin"] <= LOGIT_TOLERANCE[model.compute_dtype],
        "predicted_tokens_per_second": len(prompts) * new / predicted,
        "spread": spread(seconds),
        "prefill_ms": 1000 * prefill,
        "first_run_seconds": compile_seconds,
        "compile": compile,
        "gpu_utilization": utilization.mean,
    }


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
