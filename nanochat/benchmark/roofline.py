"""What decoding must cost: the bytes that a step has to read and the operations that it has to do, over what the device gave.

Both rates are measured here and now, not taken from a data sheet: the bandwidth of a copy and the rate of one large matrix
product.
"""

import statistics
from dataclasses import dataclass

import torch

from nanochat import hardware
from nanochat.benchmark.timing import repeat
from nanochat.infer.capacity import row_bytes
from nanochat.model.gpt import GPT


@dataclass(frozen=True)
class Rates:
    """Of the device, measured."""

    copy_bytes_per_second: float  # bytes read plus bytes written
    matmul_flops_per_second: float  # in the model's dtype


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy of a tensor far beyond the caches; product of two square matrices."""
    size, width = (2**30, 8192) if device.type == "cuda" else (2**26, 1024)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(repeat(lambda: target.copy_(source), device, 10, 1.0, warmup=2))
    matrix = torch.randn(width, width, device=device).to(dtype)
    product = torch.empty_like(matrix)
    multiply = statistics.median(repeat(lambda: torch.mm(matrix, matrix, out=product), device, 10, 1.0, warmup=2))
    return Rates(2 * size / copy, 2 * width**3 / multiply)


@dataclass(frozen=True)
class DecodeCost:
    """One decode step of some rows: bytes that it must move and FLOPs that it must do."""

    bytes: float
    flops: float

    def seconds(self, rates: Rates) -> float:
        """The roofline: whichever of the two takes longer."""
        return max(self.bytes / rates.copy_bytes_per_second, self.flops / rates.matmul_flops_per_second)


def weight_bytes(model: GPT) -> int:
    """Of the matrices that take part in products, in the dtype they are kept in."""
    return model.matmul_parameters() * model.head.element_size()


def cached_step(model: GPT, rows: int, filled: float) -> DecodeCost:
    """A step with a cache of `filled` positions a row: weights once, the keys and values that each layer sees of each row."""
    config = model.config
    seen = sum(min(filled, block.attention.window or filled) for block in model.blocks)  # positions, of all layers
    keys_and_values = rows * seen / config.depth * row_bytes(config, 1, model.compute_dtype.itemsize)
    attention = 4 * config.width * seen  # q k and p v, 2 FLOPs a multiply-add
    return DecodeCost(weight_bytes(model) + keys_and_values, rows * (2 * model.matmul_parameters() + attention))


def recomputed_step(model: GPT, rows: int, length: float) -> DecodeCost:
    """A step without a cache: the blocks over all `length` tokens of each row, the head over the last."""
    config = model.config
    head = model.head.numel()
    blocks = 2 * (model.matmul_parameters() - head) * length
    windows = [min(length, block.attention.window or length) for block in model.blocks]
    attention = 4 * config.width * sum(window * (length - window / 2) for window in windows)  # the causal half
    return DecodeCost(weight_bytes(model), rows * (blocks + attention + 2 * head))


# Memory bandwidth in bytes/s from the vendors' data sheets, for projections; the peaks are those of `hardware`.
PROJECTED = {
    "A100 80GB SXM": ("A100", 2.039e12),
    "V100 SXM2": ("V100", 0.9e12),
    "T4": ("T4", 0.32e12),
    "RTX 4090": ("RTX 4090", 1.008e12),
}


def operations(prompt_tokens: int, new_tokens: int) -> dict:
    """Tokens that go through the model for one row, without and with a cache, and what their ratio is not.

    For 50 and 200 it is 119.6: the speed-up that a cache would give if time were proportional to operations. A step with a cache
    has so few of them that it is bound by the bytes it reads, so a measured speed-up over this ratio is no efficiency.
    """
    without = sum(range(prompt_tokens, prompt_tokens + new_tokens))
    with_cache = prompt_tokens + new_tokens
    return {
        "token_passes_without_cache": without,
        "token_passes_with_cache": with_cache,
        "ratio_of_operations": without / with_cache,
    }


def generation_seconds(model: GPT, rows: int, prompt_tokens: int, new_tokens: int, rates: Rates) -> tuple[float, float]:
    """The roofline's time for all new tokens (without a cache, with one)."""
    lengths = range(prompt_tokens, prompt_tokens + new_tokens)
    without = sum(recomputed_step(model, rows, length).seconds(rates) for length in lengths)
    cached = sum(cached_step(model, rows, length).seconds(rates) for length in lengths[1:])
    return without, recomputed_step(model, rows, prompt_tokens).seconds(rates) + cached


def projections(model: GPT, batch_sizes: list[int], prompt_tokens: int, new_tokens: int, reached: float) -> list[dict]:
    """Tokens per second on devices that were not measured: the roofline of their data sheets, times the fraction `reached` here.

    Projections and nothing more: they assume that the same fraction is reached there.
    """
    rows = []
    for name, (key, bandwidth) in PROJECTED.items():
        flops = hardware.peak_flops(key, model.compute_dtype)
        for size in batch_sizes:
            without, cached = generation_seconds(model, size, prompt_tokens, new_tokens, Rates(bandwidth, flops))
            rows.append(
                {
                    "projection": True,
                    "device": name,
                    "batch_size": size,
                    "roofline_tokens_per_second": size * new_tokens / cached,
                    "projected_tokens_per_second": reached * size * new_tokens / cached,
                    "roofline_speedup_of_the_cache": without / cached,
                }
            )
    return rows
