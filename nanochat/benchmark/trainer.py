"""The trainer itself at full speed: an optimizer step with its loader, update, log line and checkpoints, and what several GPUs give.

d12, d20                       one GPU, 524,288 tokens a step, the plain transformer; on a CPU, or with settings, the model that those name
d12_additions, d20_additions   as they are trained, with model.additions
<model>_wide, <model>_split    2, 4, 8, ... GPUs of this machine: as many tokens a GPU as one has in the row above; as many in all

Each row comes from a process of its own, `python -m nanochat.benchmark.trainer TASK`, and where it compiles from a second one before
it, of two steps, that finds the compilers' caches empty. Text is random tokens in token shards. Times are the wall clock
between the log's lines; a checkpoint is saved in the middle, and its stall is by how much the step after it is longer.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import command_settings, config, hardware
from nanochat.benchmark.timing import spread
from nanochat.data.loader import PretrainLoader
from nanochat.data.token_shards import TokenShard, TokenShards, dtype_of
from nanochat.errors import UserError
from nanochat.files import read_json, read_json_lines, sha256, write_json
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.progress import say
from nanochat.train.distributed import World, world
from nanochat.train.prober import EXIT_OUT_OF_MEMORY
from nanochat.train.trainer import Trainer

# Layers -> rows of a micro-batch, of those that one H100 trains fastest with.
DEPTHS = {12: 32, 20: 16}
PLAIN = {f"d{depth}": config.Model(depth=depth, additions=[]) for depth in DEPTHS}
ADDED = {f"d{depth}_additions": config.Model(depth=depth) for depth in DEPTHS}
LENGTH, VOCAB_SIZE, TOKENS_PER_STEP = 2048, 32_768, 524_288
STEPS = {"cuda": 50, "cpu": 6}
CPU_ROWS = 8
WARM_STEPS = 5  # before the measured ones: the allocator and the loader's thread have settled
TEXT_STEPS = 4  # text for so many steps is written; then it begins anew
TIMEOUT_SECONDS = 900
NEVER = 10**9  # steps


class ProcessFailed(UserError):
    """A measuring process did not end well; its words are on the terminal."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def no_gpu(name: str) -> UserError:
    return UserError(f"benchmark {name}: no GPU here. For a CPU give settings: --config results/config/benchmark.json")


def measure(
    settings: command_settings.BenchmarkSettings | None, plan_path: str | None, cases: list[str], steps: int | None
) -> Iterator[dict[str, Any]]:
    """The rows of benchmark/trainer.json, one by one. This process makes no CUDA context.

    settings   None: d12 and d20
    cases      of the models these alone, d12 for one; empty: all
    plan_path  where rows of a micro-batch and tokens of a step come from
    steps      measured ones in a row; None: STEPS
    """
    gpus = len(hardware.visible_gpus())
    if settings is None and not gpus:
        raise no_gpu("trainer")
    gpus = min(gpus, settings.benchmark.gpus) if settings else gpus
    for task in _tasks(settings, plan_path, gpus, steps or STEPS["cuda" if gpus else "cpu"]):
        if cases and task["case"] not in cases:
            continue
        with tempfile.TemporaryDirectory(prefix="nanochat-trainer-") as caches:
            alone = _compiled_before(task | {"gpus": min(gpus, 1)}, caches)
            yield _said(alone)
            for count, kind in itertools.product(_several(gpus), ("wide", "split")):
                tokens = task["tokens_per_step"] * (count if kind == "wide" else 1)
                more = {"case": f"{task['case']}_{kind}", "gpus": count, "tokens_per_step": tokens}
                row = in_processes(task | more, caches)
                yield _said(row | {"efficiency": row["tokens_per_second"] / (count * alone["tokens_per_second"])})


def _several(gpus: int) -> list[int]:
    """2, 4, 8, ... and all of them."""
    return sorted({*itertools.takewhile(lambda n: n < gpus, (2**k for k in itertools.count(1))), gpus} - {0, 1})


def _said(row: dict[str, Any]) -> dict[str, Any]:
    say("benchmark trainer", f"{row['case']}, {row['gpus']} GPU(s): {row['tokens_per_second']:,.0f} tokens/s")
    return row


def _tasks(
    settings: command_settings.BenchmarkSettings | None, plan_path: str | None, gpus: int, steps: int
) -> list[dict[str, Any]]:
    """What each row's process is told."""
    if settings is None:
        common = {"vocab_size": VOCAB_SIZE, "sequence_length": LENGTH, "dtype": "auto", "compile": "auto", "seed": 1337}
        return [
            common
            | {"case": case, "model": model.resolved().model_dump(), "rows": DEPTHS[model.depth]}
            | {"tokens_per_step": TOKENS_PER_STEP, "steps": steps}
            for case, model in (PLAIN | ADDED).items()
        ]
    names = ("vocab_size", "sequence_length", "dtype", "compile", "seed")
    task = {name: getattr(settings, name) for name in names}
    plan = read_json(plan_path) if plan_path else {}
    rows = plan.get("device_batch_size") or (DEPTHS[12] if gpus else CPU_ROWS)
    tokens = rows * settings.sequence_length * plan.get("grad_accum_steps", 1)
    sizes = settings.model.resolved()
    task |= {"case": f"d{sizes.depth}", "model": sizes.model_dump(), "rows": rows, "tokens_per_step": tokens}
    return [task | {"steps": steps}]


def _compiled_before(task: dict[str, Any], caches: str) -> dict[str, Any]:
    """A row, from the second process; the first fills the empty folder `caches`."""
    cold = in_processes(task | {"steps": 0}, caches)["compile_seconds"] if task["compile"] != "off" else None
    row = in_processes(task, caches)
    return row | {"compile_seconds": cold if row["compile"] else None, "efficiency": None}


def in_processes(task: dict[str, Any], caches: str | None, ranks: int | None = None) -> dict[str, Any]:
    """`measured` by a process for each GPU (or `ranks`), which keep what they compile in the folder `caches`."""
    environment = dict(os.environ)
    if caches:
        environment["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(caches, "inductor")
        environment["TRITON_CACHE_DIR"] = os.path.join(caches, "triton")
    command = [sys.executable, "-m", "nanochat.benchmark.trainer", json.dumps(task)]
    if (ranks or task["gpus"]) > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks or task['gpus']}"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS)
    if ran.returncode:
        raise ProcessFailed(
            f"benchmark: the process of {task['case']} failed with exit code {ran.returncode}", ran.returncode
        )
    return json.loads(ran.stdout.splitlines()[-1])


class _SavingInTheMiddle(Trainer):
    """A trainer that saves once more, after the step `save_at`."""

    save_at = 0

    def _step(self, save_due: bool) -> tuple[dict[str, Any], bool, bool]:
        return super()._step(save_due or self.step + 1 == self.save_at)


def measured(task: dict[str, Any], ranks: World) -> dict[str, Any]:
    """Train WARM_STEPS + task["steps"] steps and say how long they took; with 0 steps only what compiling took."""
    sizes, length, rows = config.Model(**task["model"]), task["sequence_length"], task["rows"]
    steps = WARM_STEPS + task["steps"] if task["steps"] else 2
    settings = _training_settings(task)
    model = GPT(GPTConfig.from_settings(sizes, task["vocab_size"], length))
    model.init_weights(torch.Generator().manual_seed(task["seed"]))
    model.to(ranks.device).compute_dtype = hardware.resolve_dtype(task["dtype"], ranks.device)
    # Each rank writes its own: they need not share a folder, and the text is the same.
    with tempfile.TemporaryDirectory(prefix="nanochat-trainer-") as folder:
        shards = _random_text(Path(folder), task["vocab_size"], TEXT_STEPS * task["tokens_per_step"] + 1, task["seed"])
        trainer = _SavingInTheMiddle(
            settings,
            ranks,
            model,
            PretrainLoader(shards, task["tokens_per_step"] // length, length, task["seed"]),
            PretrainLoader(shards, rows, length, None) if "validate_every_steps" in task else None,
            np.ones(task["vocab_size"], dtype=np.int64),
            steps,
            rows,
            Path(folder) / "checkpoints",
            Path(folder) / "log.jsonl",
            "benchmark",
        )
        trainer.save_at = WARM_STEPS + task["steps"] // 2
        with hardware.GpuUtilization(ranks.device) as sampled:
            trainer.run()
        lines = read_json_lines(Path(folder) / "log.jsonl") if ranks.leads else []
    return _row(task, trainer, lines, sampled) if ranks.leads else {}


def _row(task: dict[str, Any], trainer: Trainer, lines: list[dict], sampled: hardware.GpuUtilization) -> dict[str, Any]:
    history, ranks, sizes = trainer.history, trainer.world, trainer.model.config
    if not task["steps"]:
        return {"compile_seconds": history.compile_seconds}
    first = WARM_STEPS - 1  # a step lasts from the line before it to its own
    lasted = [after["time"] - before["time"] for before, after in zip(lines[first:], lines[first + 1 :], strict=False)]
    if len(lines) < WARM_STEPS + task["steps"]:
        raise UserError(f"benchmark trainer: ended after {len(lines)} of {WARM_STEPS + task['steps']} steps.")
    after_save = lasted.pop(trainer.save_at - WARM_STEPS)
    median = statistics.median(lasted)
    rate = task["tokens_per_step"] / median
    flops = hardware.flops_per_token(
        trainer.model.matmul_parameters(), sizes.depth, sizes.width, task["sequence_length"]
    )
    peak = hardware.peak_flops(hardware.device_name(ranks.device), trainer.model.compute_dtype)
    timed = lines[WARM_STEPS:]
    return {
        "case": task["case"],
        "gpus": task["gpus"],
        "depth": sizes.depth,
        "width": sizes.width,
        "heads": sizes.heads,
        "device_batch_size": task["rows"],
        "grad_accum_steps": trainer.micro_steps,
        "tokens_per_step": task["tokens_per_step"],
        "sequence_length": task["sequence_length"],
        "vocab_size": task["vocab_size"],
        "compile": trainer.compiled,
        "compile_seconds": None,
        "compile_warm_seconds": history.compile_seconds if trainer.compiled else None,
        "tokens_per_second": rate,
        "real_tokens_per_second": rate,  # text end to end: no padding
        "mfu": rate * flops / (peak * ranks.size) if peak else None,
        "peak_memory_bytes": history.peak_memory_bytes,
        "spread": spread(lasted),
        "steps": len(lasted),
        "ms_per_step": 1000 * median,
        "loader_fraction": sum(line["loader_seconds"] for line in timed) / sum(line["seconds"] for line in timed),
        "checkpoint_stall_steps": (after_save - median) / median,
        "checkpoint_write_seconds": history.checkpoint_write_seconds / 2,  # one in the middle, one at the end
        "gpu_utilization": sampled.mean,
        "clock_hz": sampled.clock_hz,
        "power_watts": sampled.power_watts,
    }


def _training_settings(task: dict[str, Any]) -> command_settings.TrainingSettings:
    """No validation unless the task says so, and no checkpoint but those that are measured."""
    return command_settings.TrainingSettings.for_measuring(
        config.Model(**task["model"]),
        task["vocab_size"],
        task["dtype"],
        task["compile"],
        task["seed"],
        gpus=task["gpus"],
        sequence_length=task["sequence_length"],
        tokens_per_step=task["tokens_per_step"],
        validate_every_steps=task.get("validate_every_steps", NEVER),
        validation_tokens=2 * task["rows"] * task["sequence_length"],
    )


def _random_text(folder: Path, vocab_size: int, tokens: int, seed: int) -> TokenShards:
    """One token shard of random tokens, as the stage `tokens` writes them."""
    path, dtype = folder / "train-00000.bin", dtype_of(vocab_size)
    np.random.default_rng(seed).integers(0, vocab_size, tokens).astype(dtype).tofile(path)
    shard = TokenShard(path.name, "train", tokens, 1, tokens, path.stat().st_size, sha256(path))
    metrics = {
        "dtype": str(dtype),
        "vocab_size": vocab_size,
        "bos_id": 0,
        "tokenizer_sha256": "",
        "shards": [vars(shard)],
    }
    write_json(folder / "metrics.json", metrics)
    return TokenShards.open(folder, "train", verify=False)


def main() -> int:
    task = json.loads(sys.argv[1])
    with world(task["gpus"]) as ranks:
        try:
            row = measured(task, ranks)
        except torch.OutOfMemoryError:
            if ranks.size > 1:
                os._exit(EXIT_OUT_OF_MEMORY)  # the others wait in a collective
            return EXIT_OUT_OF_MEMORY
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        if ranks.leads:
            print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
