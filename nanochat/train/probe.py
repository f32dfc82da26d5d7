"""One batch size tried for real, in a process of its own: `python -m nanochat.train.probe SETTINGS.json`.

It is the trainer itself that runs here, on random tokens: compiled as it compiles, with its optimizer's state, its buffers, two
micro-steps of accumulation and a validation. A fresh process each time, since one that ran out of memory has fragments and leaks
that change the next answer.

The process imports what it needs, the compiler too, then waits for a line {rows, seconds, host_bytes} on its standard input: so it
can be started while another one measures, and touches no GPU before. It prints one JSON line. Exit code 86: out of memory.

Memory that counts is what the driver says is used on the GPU, at its peak: most that the caching allocator ever reserved (what it
holds but does not use is not free for anyone else) and what is used beside it: the CUDA context, libraries, other processes.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import command_settings, hardware
from nanochat.files import read_json_lines, read_settings
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.distributed import World
from nanochat.train.trainer import Trainer

EXIT_OUT_OF_MEMORY = 86
MICRO_STEPS = 2
STEPS = 10**6  # more than are run
WARM_STEPS = 2  # the second still allocates what the first did not reach, and is followed by the validation
# A step's clock stops before its update has run, which the next step waits for; the first after the validation waits for none.
UNTIMED_STEPS = WARM_STEPS + 1
AHEAD_STEPS = 3  # a loader's thread may be asked so many steps before the one that is computed
TIMED_STEPS = {"cuda": 4, "cpu": 1}  # at least
# A GPU that rested runs above the clock that its power limit allows for long: an H100's first second of steps is 2 to 6% faster.
SETTLING_SECONDS = 2.0
COMMUNICATION_BYTES = 2**30  # what NCCL takes for its channels and contexts, where there are several GPUs


class Enough(Exception):
    """Measured for long enough."""


class Rows:
    """Random tokens in place of a loader; raises Enough when the trainer asks for more than is to be measured."""

    def __init__(self, rows: int, sequence_length: int, vocab_size: int, timed_steps: int = 0, seconds: float = 0.0):
        self.rows_per_step, self.rows_per_epoch, self.sequence_length = MICRO_STEPS * rows, rows, sequence_length
        self.timed_steps, self.seconds, self.started = timed_steps, seconds, 0.0
        tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, sequence_length + 1))
        self.inputs, self.targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()

    def micro_batch(self, step: int, first_row: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: (rows, T) int64, always the same."""
        if self.timed_steps and first_row == 0:
            if step == UNTIMED_STEPS + AHEAD_STEPS:
                self.started = time.monotonic()
            lasted = time.monotonic() - self.started if step > UNTIMED_STEPS + AHEAD_STEPS else 0.0
            # One step more than is timed: the log may be one behind.
            if step > UNTIMED_STEPS + self.timed_steps and lasted >= self.seconds + SETTLING_SECONDS * (
                self.seconds > 0
            ):
                raise Enough
        return self.inputs[:rows], self.targets[:rows]


class ValidatingOnce(Trainer):
    """A validation is a pause, after which a step is another one: it is worth its memory, not a place among what is timed."""

    def validate(self) -> float | None:
        self.train = self.train.model_copy(update={"validate_every_steps": STEPS})
        return super().validate()


def measure(
    settings: command_settings.PlanSettings, rows: int, seconds: float = 0.0, scratch: Path | None = None
) -> dict[str, Any]:
    """Train some steps of `rows` rows a micro-batch and say what they took.

    seconds  to time steps for, at least, once the GPU's clock has settled; 0: some steps, for their memory
    scratch  folder for what the trainer writes; who started this process clears it, should this one be killed
    """
    device = hardware.pick_device(settings.gpus)
    hardware.reset_peak_memory(device)
    length, vocab_size = settings.sequence_length, settings.vocab_size
    with torch.device(device):
        model = GPT(GPTConfig.from_settings(settings.model, vocab_size, length))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter.size(-1) ** -0.5)
    model.compute_dtype = hardware.resolve_dtype(settings.dtype, device)
    several = device.type == "cuda" and settings.gpus > 1
    held = torch.empty(COMMUNICATION_BYTES if several else 0, dtype=torch.uint8, device=device)
    loader = Rows(rows, length, vocab_size, TIMED_STEPS[device.type], seconds)
    with tempfile.TemporaryDirectory(prefix="nanochat-probe-", dir=scratch) as folder:
        log = Path(folder) / "log.jsonl"
        trainer = ValidatingOnce(
            training_settings(settings, rows),
            World(0, 1, device),
            model,
            loader,
            Rows(rows, length, vocab_size),
            np.ones(vocab_size, dtype=np.int64),
            steps=STEPS,
            micro_rows=rows,
            checkpoints=Path(folder) / "checkpoints",
            log=log,
            fingerprint="probe",
        )
        sampler = hardware.GpuUtilization(device, every_seconds=0.1)
        try:
            with sampler:
                trainer.run()
        except Enough:
            hardware.synchronize(device)
        steps = settled(read_json_lines(log)[UNTIMED_STEPS:], SETTLING_SECONDS if seconds else 0.0)
    update_seconds = statistics.median(_seconds_of_update(trainer, device) for _ in range(3))
    step_seconds = midmean(steps)
    beside_bytes = hardware.used_beside_bytes(device)
    del held
    return {
        "peak_bytes": hardware.peak_memory_bytes(device) + beside_bytes,
        "beside_bytes": beside_bytes,
        "capacity_bytes": hardware.memory_capacity_bytes(device),
        "micro_step_seconds": max(step_seconds - update_seconds, step_seconds / 2) / MICRO_STEPS,
        "optimizer_seconds": update_seconds,
        "spread": statistics.pstdev(steps) / step_seconds,
        "gpu_utilization": sampler.recent(sum(steps)),
        "used_bytes": sampler.most_used_bytes,
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "compiled": trainer.compiled,
    }


def settled(lines: list[dict[str, Any]], after: float) -> list[float]:
    """Seconds of the steps that began `after` seconds and more into these lines of a log; of all, where fewer than two did."""
    began = [line["time"] - line["seconds"] for line in lines]
    late = [line["seconds"] for line, start in zip(lines, began, strict=True) if start - began[0] >= after]
    return late if len(late) > 1 else [line["seconds"] for line in lines]


def midmean(values: list[float]) -> float:
    """Mean of the middle half. A clock that sways about its limit moves a median, one slow step a mean."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def training_settings(settings: command_settings.PlanSettings, rows: int) -> command_settings.TrainingSettings:
    """Those of a training of such micro-batches, with one validation among the first steps and no checkpoint."""
    tokens = rows * settings.sequence_length
    return command_settings.TrainingSettings.for_measuring(
        settings.model,
        settings.vocab_size,
        settings.dtype,
        settings.compile,
        seed=0,
        on_nonfinite="skip",
        gpus=settings.gpus,
        sequence_length=settings.sequence_length,
        tokens_per_step=MICRO_STEPS * tokens,
        validate_every_steps=WARM_STEPS,
        validation_tokens=tokens,
    )


def is_out_of_host_memory(error: BaseException) -> bool:
    """torch's allocator on a CPU has no exception of its own."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _seconds_of_update(trainer: Trainer, device: torch.device) -> float:
    hardware.synchronize(device)
    started = time.perf_counter()
    trainer.optimizer.step(0, 0.0)
    hardware.synchronize(device)
    return time.perf_counter() - started


def main() -> int:
    settings = read_settings(sys.argv[1], command_settings.PlanSettings)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: who is killed leaves no probe on the GPU
    if settings.gpus and settings.compile != "off":
        importlib.import_module("torch._inductor.compile_fx")  # torch does at the first use: 2.6 s on an H100's host
    line = sys.stdin.readline()
    if not line:
        return 0  # not needed after all
    task = json.loads(line)
    if not settings.gpus:
        # The kernel would end the whole job instead.
        resource.setrlimit(resource.RLIMIT_DATA, (task["host_bytes"], resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        result = measure(settings, task["rows"], task["seconds"], Path(sys.argv[1]).parent)
    except Exception as error:
        if hardware.is_out_of_gpu_memory(error) or is_out_of_host_memory(error):
            return EXIT_OUT_OF_MEMORY
        raise
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a trainer that was left in the middle need not be waited for
