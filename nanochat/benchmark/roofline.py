"""What decoding must cost: the bytes that a step has to read and the operations that it has to do, over what the device gave.

Both rates are measured here and now, not taken from a data sheet: the bandwidth of a copy and the rate of one large matrix
product.
"""

import statistics
from dataclasses import dataclass

import torch

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
    """A step with a cache of `filled` positions a row: weights once, the filled keys and values of each row."""
    config = model.config
    keys_and_values = rows * filled * row_bytes(config, 1, model.compute_dtype.itemsize)
    attention = 4 * config.depth * config.width * filled  # q k and p v, 2 FLOPs a multiply-add
    return DecodeCost(weight_bytes(model) + keys_and_values, rows * (2 * model.matmul_parameters() + attention))


def recomputed_step(model: GPT, rows: int, length: float) -> DecodeCost:
    """A step without a cache: the blocks over all `length` tokens of each row, the head over the last."""
    config = model.config
    head = model.head.numel()
    blocks = 2 * (model.matmul_parameters() - head) * length
    attention = 4 * config.depth * config.width * length * length / 2  # the causal half
    return DecodeCost(weight_bytes(model), rows * (blocks + attention + 2 * head))
