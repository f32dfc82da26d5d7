"""What the rows of a micro-batch do to speed and memory, and whether the plan's choice is the best one.

base_default, sft_default   the study's micro-batches: 32 rows for pretraining, 4 for finetuning
base_found, sft_found       what the search finds for them
curve                       powers of two and every divisor of a step's rows, to where memory ends

Each row is a probe as the search makes them, in a process of its own on a GPU, eager and compiled. `tokens_per_second` is of whole
optimizer steps, `forward_backward_tokens_per_second` of micro-steps alone, as the study counted. Utilisation and
`used_bytes` (of the whole device) are NVML's samples while it trained.
"""

import contextlib
import io
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from nanochat import command_settings, config, hardware
from nanochat.files import read_json
from nanochat.progress import say
from nanochat.train.batch_size import make_plan
from nanochat.train.plan import rows_per_step
from nanochat.train.prober import DidNotRun, Prober

STUDY = {"base": 32, "sft": 4}
TOKENS_PER_STEP = {"base": 524_288, "sft": 65_536}
CPU_ROWS, CPU_SIZES = 8, 3  # of a step, and of the curve, on a CPU: a few seconds in all
MOST_SIZES = 12
SECONDS = 2.0  # of steps, for a row on a GPU: NVML averages over up to one


def measure(
    settings: command_settings.BenchmarkSettings, gpu: hardware.Gpu | None, plan_path: str | None, compile: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and facts of benchmark/batch_size.json.

    plan_path  the plan whose choice is looked at; None: a search of its own
    compile    measure compiled rows too
    """
    found, tokens_per_step = _found(settings, gpu, plan_path)
    step_rows = rows_per_step(tokens_per_step, settings.sequence_length, 1, "train.base")
    labels = [("base_default", min(STUDY["base"], step_rows)), ("sft_default", min(STUDY["sft"], step_rows))]
    labels += [(f"{stage}_found", size) for stage, size in found.items()]
    curve = _curve(step_rows)[0 if gpu else -CPU_SIZES :]
    sizes = sorted({*curve, *(size for _, size in labels)})
    rows: list[dict[str, Any]] = []
    best: dict[bool, dict[int, float]] = {}
    for compiled in (False, True) if compile else (False,):
        own = _plan_settings(settings, "base", tokens_per_step, gpu, "on" if compiled else "off")
        results = {}
        with _prober(own, gpu) as probe:
            for size in sizes:
                try:
                    results[size] = _row(settings, own, gpu, size, step_rows, probe(size))
                except DidNotRun as error:
                    say("benchmark batch_size", f"{size} rows, {'compiled' if compiled else 'eager'}: {error}")
                    break
                rate = results[size]["tokens_per_second"]
                say("benchmark batch_size", f"{size} rows, {'compiled' if compiled else 'eager'}: {rate:,.0f} tokens/s")
        rows += [{"case": case, **results[size]} for case, size in labels if size in results]
        rows += [{"case": "curve", **result} for result in results.values()]
        best[compiled] = {n: row["tokens_per_second"] for n, row in results.items() if step_rows % n == 0}
    # The sweep is over what training would use: compiled where that works.
    speeds = best[max(best)]
    choice, fastest = found.get("base"), max(speeds, key=speeds.get)
    share = None
    if choice in speeds:
        with _prober(own, gpu) as probe:

            def rate(size: int) -> float:
                return _row(settings, own, gpu, size, step_rows, probe(size))["tokens_per_second"]

            try:
                share = _against_the_fastest(rate, speeds, choice, fastest)
            except DidNotRun as error:  # which it did before: the rows stay
                say("benchmark batch_size", f"{choice} and {fastest} rows were not timed again: {error}")
    return rows, {
        "tokens_per_step": tokens_per_step,
        "choice": choice,
        "fastest": fastest,
        "choice_over_fastest": share,
    }


def _against_the_fastest(rate: Callable[[int], float], speeds: dict[int, float], choice: int, fastest: int) -> float:
    """The choice's speed over the fastest's, medians of the sweep's timing and two more in turns.

    The largest of many timings is one that noise favoured, so that by the sweep alone any choice looks slow.
    """
    if choice == fastest:
        return 1.0
    timed = {size: [speeds[size]] for size in (fastest, choice)}
    for _ in range(2):
        for size, rates in timed.items():
            rates.append(rate(size))
            say("benchmark batch_size", f"{size} rows again: {rates[-1]:,.0f} tokens/s")
    return statistics.median(timed[choice]) / statistics.median(timed[fastest])


def _found(
    settings: command_settings.BenchmarkSettings, gpu: hardware.Gpu | None, plan_path: str | None
) -> tuple[dict[str, int], int]:
    """The search's answer for base and sft, and the tokens of base's step on one device."""
    if plan_path:
        plan = read_json(plan_path)
        tokens = plan["tokens_per_step"] // max(1, plan.get("gpus") or 1)
        return {"base": plan["device_batch_size"]}, tokens
    if gpu is None:
        return {}, CPU_ROWS * settings.sequence_length
    plans = {
        stage: make_plan(_plan_settings(settings, stage, tokens, gpu, settings.compile))["device_batch_size"]
        for stage, tokens in TOKENS_PER_STEP.items()
    }
    return plans, TOKENS_PER_STEP["base"]


def _curve(step_rows: int) -> list[int]:
    """Powers of two and the divisors of a step's rows, thinned from below."""
    sizes = {n for n in range(1, step_rows + 1) if step_rows % n == 0} | {2**i for i in range(step_rows.bit_length())}
    powers = {n for n in sizes if n.bit_count() == 1}
    return sorted(powers | set(sorted(sizes - powers)[-max(0, MOST_SIZES - len(powers)) :]))


def _plan_settings(
    settings: command_settings.BenchmarkSettings,
    stage: str,
    tokens_per_step: int,
    gpu: hardware.Gpu | None,
    compile: str,
) -> command_settings.PlanSettings:
    return command_settings.PlanSettings(
        stage=stage,
        model=settings.model.resolved(),
        vocab_size=settings.vocab_size,
        gpus=1 if gpu else 0,
        sequence_length=settings.sequence_length,
        tokens_per_step=tokens_per_step,
        device_batch_size=None,
        dtype=settings.dtype,
        compile=compile,
        batch_size=config.BatchSize(),
    )


@contextlib.contextmanager
def _prober(
    settings: command_settings.PlanSettings, gpu: hardware.Gpu | None
) -> Iterator[Callable[[int], dict[str, Any]]]:
    """A probe of some rows. On a CPU in this process: starting one takes longer than measuring."""
    if gpu is None:
        from nanochat.train import probe

        def measured(size: int) -> dict[str, Any]:
            with contextlib.redirect_stderr(io.StringIO()):  # the steps of a probe are no progress of this run
                return probe.measure(settings, size)

        yield measured
        return
    with Prober(settings, settings.batch_size.probe_timeout_seconds, gpu.uuid) as prober:
        yield lambda size: prober(size, SECONDS)


def _row(
    settings: command_settings.BenchmarkSettings,
    own: command_settings.PlanSettings,
    gpu: hardware.Gpu | None,
    size: int,
    step_rows: int,
    result: dict[str, Any],
) -> dict[str, Any]:
    length, model = own.sequence_length, own.model
    micro_steps = max(1, step_rows // size)
    seconds = micro_steps * result["micro_step_seconds"] + result["optimizer_seconds"]
    rate = micro_steps * size * length / seconds
    matmul_parameters = hardware.parameter_count(model, own.vocab_size)
    matmul_parameters -= hardware.embedding_parameters(model, own.vocab_size)
    flops = hardware.flops_per_token(matmul_parameters, model.depth, model.width, length)
    peak = hardware.peak_flops(gpu.name, result["dtype"]) if gpu else None
    used, capacity = result["used_bytes"], gpu.memory_bytes if gpu else None
    return {
        "depth": model.depth,
        "width": model.width,
        "device_batch_size": size,
        "grad_accum_steps": micro_steps,
        "sequence_length": length,
        "vocab_size": own.vocab_size,
        "compile": result["compiled"],
        "tokens_per_second": rate,
        "real_tokens_per_second": rate,  # random tokens: no padding
        "forward_backward_tokens_per_second": size * length / result["micro_step_seconds"],
        "mfu": rate * flops / peak if peak else None,
        "peak_memory_bytes": result["peak_bytes"],
        "used_bytes": used,
        "used_fraction": used / capacity if used and capacity else None,
        "gpu_utilization": result["gpu_utilization"],
        "spread": result["spread"],
    }
