"""What compiling costs and gives: a training step eager and compiled, for the study's micro-batches and for training's own.

base, sft   the study's step, model and loss as one graph; it expected 1.5x for finetuning and did not measure it
training    the plan's micro-batch with all kernels of this package

Each is measured in processes of its own, `python -m nanochat.benchmark.compile TASK`: the first finds the compilers' caches
empty, the second as the first has left them, as after a restart. `compile_seconds` (cold) and `compile_warm_seconds` are what the
first step takes beyond a later one: blocks, loss and the optimizer's update.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

from nanochat import hardware
from nanochat.benchmark.models import random_model
from nanochat.benchmark.training import STUDY_ROWS, Case, Rows, conversations_of, measure_case
from nanochat.command_settings import BenchmarkSettings
from nanochat.model.kernels import KERNELS, fused
from nanochat.progress import say

PLAN_TOKENS = {"cuda": 65_536, "cpu": 2048}  # of the plan's micro-batch, where none is given
TIMEOUT_SECONDS = 600


def measure(settings: BenchmarkSettings, device: torch.device, plan: int | None, compile: bool, folder: str | None):
    """The rows of benchmark/compile.json; eager ones alone where nothing compiles.

    plan    the plan's rows of a micro-batch
    folder  of encoded conversations; None: random ones
    """
    study = STUDY_ROWS[device.type]
    rows_per_step = max(study.values())
    shapes = [(stage, rows, rows_per_step, ()) for stage, rows in study.items()]
    plan = plan or max(1, PLAN_TOKENS[device.type] // settings.sequence_length)
    shapes.append(("training", plan, plan, KERNELS))
    results = []
    for stage, rows, rows_per_step, kernels in shapes:
        task = {
            "device": device.type,
            "settings": settings.model_dump(mode="json"),
            "folder": folder,
            "stage": stage,
            "rows": rows,
            "rows_per_step": rows_per_step,
            "kernels": kernels,
        }
        if not compile:
            results += measured(task | {"compiled": [False]})
            continue
        eager, compiled = before_and_after(task)
        results += [eager, compiled]
        times = compiled["tokens_per_second"] / eager["tokens_per_second"]
        took = f"{compiled['compile_seconds']:.1f} s cold, {compiled['compile_warm_seconds']:.1f} s warm"
        say("benchmark compile", f"{stage}, {rows} rows: {times:.2f}x, compiled in {took}")
    return results


def before_and_after(task: dict[str, Any]) -> tuple[dict, dict]:
    """The eager and the compiled row, from two processes of which the first finds nothing compiled."""
    with tempfile.TemporaryDirectory(prefix="nanochat-compile-") as caches:
        # Eager first in both: the GPU's libraries have started before anything is compiled.
        _, cold = _in_a_process(task | {"compiled": [False, True]}, caches)
        eager, warm = _in_a_process(task | {"compiled": [False, True]}, caches)
    return eager, warm | {
        "compile_seconds": cold["compile_seconds"],
        "compile_warm_seconds": warm["compile_seconds"],
    }


def measured(task: dict[str, Any]) -> list[dict]:
    """A row for each of the task's `compiled`."""
    settings = BenchmarkSettings(**task["settings"])
    device = torch.device(task["device"])
    model = random_model(settings).to(device)
    model.compute_dtype = hardware.resolve_dtype(settings.dtype, device)
    conversations, pad_id = conversations_of(settings, task["folder"])
    length = settings.sequence_length
    if task["stage"] == "sft":
        rows = Rows(conversations, length, packed=False, pad_id=pad_id)
    else:
        rows = Rows.of_one_text(conversations, length)
    stream = torch.empty(1, model.config.width, dtype=model.compute_dtype, device=device)
    kernels = tuple(kernel for kernel in task["kernels"] if fused(kernel, stream))  # those that run here
    sizes, results = (task["rows"], task["rows_per_step"]), []
    for compiled in task["compiled"]:
        name = "compiled" if compiled else "eager"
        plain_loss = task["stage"] != "training"
        case = Case(name, task["stage"], rows, *sizes, plain_loss=plain_loss, compiled=compiled, kernels=kernels)
        results.append(measure_case(case, model, settings.benchmark.steps))
    return results


def _in_a_process(task: dict[str, Any], caches: str) -> list[dict]:
    """`measured` by a new process that keeps what it compiles in the folder `caches`."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(caches, "triton"),
    }
    command = [sys.executable, "-m", "nanochat.benchmark.compile", json.dumps(task)]
    ran = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_SECONDS, check=True
    )
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measured(json.loads(sys.argv[1]))))
