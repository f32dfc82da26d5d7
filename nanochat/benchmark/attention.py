"""Attention alone, forward and backward, as training calls it and through each backend that torch has: which one is chosen, and was it right?

chosen       `model.kernels.causal_attention`, compiled where training compiles: torch's own choice of a backend, with a window
             FlexAttention, which skips the blocks that no query sees
cudnn, flash, efficient, math    that backend of scaled_dot_product_attention alone; none of them knows a window
varlen       FlashAttention by torch's varlen_attn, windows too, its inputs copied into its layout as the others have theirs

Each with the whole causal square and with windows of a half and a quarter of the length. `flops_per_second` counts what a query sees
and nothing else, so that rows with windows compare with those without.
"""

import statistics
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.benchmark.timing import device_seconds_of, spread
from nanochat.model.gpt import GPTConfig
from nanochat.model.kernels import causal_attention, window_blocks
from nanochat.progress import say

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WINDOW_PARTS = (1, 2, 4)  # of the length; 1: no window
ROWS = {"cuda": 32, "cpu": 4}  # where no plan is given
REPEATS, IN_A_ROW = 10, 5
PASSES = 3.5  # matrix products of forward and backward, in forwards: 2 and 5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(
    config: GPTConfig,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    compile: bool,
    only: Collection[str] = (),
) -> Iterator[dict]:
    """The rows of attention.json, for a micro-batch of `rows`; only: of the cases these alone, empty: all."""
    length, head_dim = config.sequence_length, config.width // config.heads
    generator = torch.Generator(device).manual_seed(1337)
    sides = [
        torch.randn(rows, heads, length, head_dim, generator=generator, device=device, dtype=dtype)
        for heads in (config.heads, config.kv_heads, config.kv_heads)
    ]
    for side in sides:
        side.requires_grad_()
    gradient = torch.randn(sides[0].shape, generator=generator, device=device, dtype=dtype)
    for part in WINDOW_PARTS:
        window = length // part if part > 1 else None
        for case, attend in cases(length, window, head_dim, device, compile).items():
            if only and case not in only:
                continue
            head = {"case": case, "batch_size": rows, "sequence_length": length, "window": window}
            try:
                times = _times(attend, sides, gradient, device)
            except Exception as error:
                # A backend that does not serve this device, or does not fit, leaves the others their measurement. A fault of this
                # package is no such thing.
                if case == "chosen" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                yield head | {"ms": None, "spread": None, "flops_per_second": None, "skipped": why}
                continue
            took = statistics.median(times)
            flops = PASSES * 4 * rows * config.heads * head_dim * pairs(length, window)
            say("benchmark attention", f"{case}, window {window or length:,} of {length:,}: {1000 * took:.2f} ms")
            yield head | {"ms": 1000 * took, "spread": spread(times), "flops_per_second": flops / took}


def cases(length: int, window: int | None, head_dim: int, device: torch.device, compile: bool) -> dict[str, Attend]:
    """What there is for this window."""
    blocks = window_blocks(length, window, head_dim, device) if compile else None
    chosen: Attend = lambda q, k, v: causal_attention(q, k, v, window, blocks)  # noqa: E731
    found = {"chosen": torch.compile(chosen, dynamic=False) if compile else chosen}
    if window is None:
        found |= {name: _through(backend) for name, backend in BACKENDS.items()}
    if device.type == "cuda":
        found["varlen"] = _varlen(window)
    return found


def pairs(length: int, window: int | None) -> int:
    """Queries and the keys that they see, of one head."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def _through(backend: SDPBackend) -> Attend:
    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            grouped = queries.size(1) != keys.size(1)
            return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)

    return attend


def _varlen(window: int | None) -> Attend:
    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        rows, _, length, _ = queries.shape
        starts = torch.arange(rows + 1, device=queries.device, dtype=torch.int32) * length
        packed = [side.transpose(1, 2).flatten(0, 1) for side in (queries, keys, values)]
        before = -1 if window is None else window - 1
        attended = varlen_attn(*packed, starts, starts, length, length, window_size=(before, 0))
        return attended.unflatten(0, (rows, length)).transpose(1, 2)

    return attend


def _times(attend: Attend, sides: list[Tensor], gradient: Tensor, device: torch.device) -> list[float]:
    """Seconds of forward and backward, on the device."""

    def work() -> None:
        torch.autograd.grad(attend(*sides), sides, gradient)

    for _ in range(3):
        work()
    return [device_seconds_of(work, device, IN_A_ROW) for _ in range(REPEATS)]
