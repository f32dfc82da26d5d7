"""One batch size tried for real, in a process of its own: `python -m nanochat.train.probe SETTINGS.json ROWS`.

The real model, optimizer with its state, two micro-steps of accumulation, an optimizer step and an evaluation, as in training.
A fresh process each time, since one that ran out of memory has fragments and leaks that change the next answer.

Prints one JSON line {peak_bytes, tokens_per_second, micro_step_seconds, optimizer_seconds}. Exit code 86: out of memory.
"""

import json
import statistics
import sys
import time

import torch

from nanochat import config, hardware
from nanochat.files import read_settings
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optimizer import Optimizer
from nanochat.train.distributed import Gradients
from nanochat.train.trainer import wants_compile

EXIT_OUT_OF_MEMORY = 86
MICRO_STEPS = 2


def measure(settings: config.PlanSettings, rows: int) -> dict[str, float]:
    """Train two steps and more of `rows` rows a micro-batch; speeds are medians of the steps after the first."""
    device = hardware.pick_device(settings.gpus)
    hardware.reset_peak_memory(device)
    length = settings.sequence_length
    model = GPT(GPTConfig.from_settings(settings.model, settings.vocab_size, length))
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    model.compute_dtype = hardware.resolve_dtype(settings.dtype, device)
    optimizer, gradients = Optimizer(model, config.Optimizer()), Gradients(list(model.parameters()))
    forward = torch.compile(model, dynamic=False) if wants_compile(settings.compile, device) else model
    tokens = torch.randint(settings.vocab_size, (rows, length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    micro, update = [], []
    for step in range(4 if device.type == "cuda" else 2):
        gradients.zero()
        for _ in range(MICRO_STEPS):
            with _timed(micro, device):
                (forward(inputs, targets, reduction="sum") / tokens.numel()).backward()
        with _timed(update, device):
            gradients.norm().item()
            optimizer.step(step, 1.0)
        if step == 0:
            with torch.no_grad():
                forward(inputs, targets, reduction="none").sum().item()
    micro_seconds, update_seconds = statistics.median(micro[MICRO_STEPS:]), statistics.median(update[1:])
    accumulated = max(1, settings.tokens_per_step // (max(settings.gpus, 1) * length * rows))
    return {
        "peak_bytes": hardware.peak_memory_bytes(device),
        "tokens_per_second": accumulated * rows * length / (accumulated * micro_seconds + update_seconds),
        "micro_step_seconds": micro_seconds,
        "optimizer_seconds": update_seconds,
    }


class _timed:
    """Append what the block takes, the device's work included."""

    def __init__(self, times: list[float], device: torch.device):
        self.times, self.device = times, device

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        hardware.synchronize(self.device)
        self.times.append(time.perf_counter() - self.started)


def main() -> int:
    try:
        result = measure(read_settings(sys.argv[1], config.PlanSettings), int(sys.argv[2]))
    except (torch.OutOfMemoryError, MemoryError):
        return EXIT_OUT_OF_MEMORY
    except RuntimeError as error:
        # The CPU allocator has no exception of its own; neither has cuBLAS when its workspace finds no room.
        if "can't allocate memory" in str(error) or "ALLOC_FAILED" in str(error):
            return EXIT_OUT_OF_MEMORY
        raise
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
