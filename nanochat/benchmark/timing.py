"""Wall-clock times with the device's queue empty before and after; medians and their spread."""

import statistics
import time
from collections.abc import Callable

import torch

from nanochat.hardware import synchronize

CYCLES_PER_SECOND = 2e9  # of a GPU, about


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def device_seconds_of(work: Callable[[], object], device: torch.device, times: int) -> float:
    """What one of `times` calls in a row takes on the device, however slowly the host launches them."""
    if device.type != "cuda":
        return seconds_of(lambda: [work() for _ in range(times)], device) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    launching = seconds_of(lambda: [work() for _ in range(times)], device)
    torch.cuda._sleep(int(1.5 * launching * CYCLES_PER_SECOND))  # until the host has launched all of it
    begin.record()
    for _ in range(times):
        work()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1000 / times


def repeat(
    work: Callable[[], object], device: torch.device, times: int, budget_seconds: float, warmup: int = 1
) -> list[float]:
    """Seconds of `times` calls after the warm-up; fewer, but at least 3, once the budget is used up."""
    for _ in range(warmup):
        work()
    seconds: list[float] = []
    while len(seconds) < times and (len(seconds) < 3 or sum(seconds) < budget_seconds):
        seconds.append(seconds_of(work, device))
    return seconds


def spread(seconds: list[float]) -> float:
    """Interquartile range over the median; 0 for a single value."""
    if len(seconds) < 2:
        return 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / statistics.median(seconds)
