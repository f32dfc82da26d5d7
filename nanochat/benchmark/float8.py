"""Would float8 pay? The matrix products of a training step in bfloat16, as they are computed, and in float8 with what it takes to get there.

qkv, out, up, down   of one block: forward and both gradients
head                 likewise
all                  a whole micro-step: the blocks' products times the depth, and the head's

bfloat16_ms   the three products
float8_ms     the same with e4m3 activations and weights, e5m2 gradients, one scale a tensor
cast_ms       largest magnitude, scaling and rounding of the three tensors, and their transposes, which float8 products need; compiled
error         of the float8 result of the forward product, relative, against bfloat16's 0.002 or so

What is gained is bfloat16_ms - float8_ms - cast_ms, where nothing else computes the casts on its way.
"""

import statistics
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from nanochat.benchmark.timing import device_seconds_of
from nanochat.model.gpt import GPTConfig
from nanochat.progress import say

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
REPEATS, IN_A_ROW = 10, 5
MEASURED = ("bfloat16_ms", "float8_ms", "cast_ms", "gain_ms", "error")


def measure(config: GPTConfig, rows: int, device: torch.device, only: Collection[str] = ()) -> Iterator[dict]:
    """The rows of float8.json, for a micro-batch of `rows`; only: of the cases these alone, empty: all."""
    tokens, total, complete = rows * config.sequence_length, dict.fromkeys(MEASURED[:-1], 0.0), not only
    for case, (outer, inner) in products(config).items():
        if only and case not in only:
            continue
        row = {"case": case, "tokens": tokens, "outer": outer, "inner": inner}
        try:
            row |= _measured(tokens, outer, inner, device)
        except (RuntimeError, NotImplementedError) as error:  # this device, or this build of torch, has no such product
            yield row | dict.fromkeys(MEASURED) | {"skipped": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            complete = False
            continue
        for name in total:
            total[name] += row[name] * (1 if case == "head" else config.depth)
        said = ", ".join(f"{name.removesuffix('_ms')} {row[name]:.2f}" for name in total)
        say("benchmark float8", f"{case}, ms of {tokens:,} tokens: {said}")
        yield row
    if complete:
        yield {"case": "all", "tokens": tokens, "outer": None, "inner": None} | total | {"error": None}


def products(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of each product x (M, K) @ weight (N, K).T."""
    width, head_dim = config.width, config.width // config.heads
    return {
        "qkv": ((config.heads + 2 * config.kv_heads) * head_dim, width),
        "out": (width, width),
        "up": (4 * width, width),
        "down": (width, 4 * width),
        "head": (config.vocab_size, width),
    }


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (A, B) in float8, its transpose (B, A), both contiguous, and what to multiply them with to get x back: () float32."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(dtype).max
    small = (x.float() / scale).to(dtype)
    return small, small.t().contiguous(), scale


def forward_and_gradients(x: tuple, weight: tuple, grad: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The three products in float8, each side as `to_float8` returns it: (M, N), (M, K), (N, K) bfloat16."""
    return (
        torch._scaled_mm(x[0], weight[0].t(), x[2], weight[2], out_dtype=torch.bfloat16, use_fast_accum=True),
        torch._scaled_mm(grad[0], weight[1].t(), grad[2], weight[2], out_dtype=torch.bfloat16),
        torch._scaled_mm(grad[1], x[1].t(), grad[2], x[2], out_dtype=torch.bfloat16),
    )


def _measured(tokens: int, outer: int, inner: int, device: torch.device) -> dict:
    torch._dynamo.reset()  # every shape is compiled for itself: all of them together would pass its limit
    generator = torch.Generator(device).manual_seed(outer + inner)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

    x, weight, grad = random(tokens, inner), random(outer, inner, scale=inner**-0.5), random(tokens, outer)
    on_gpu = device.type == "cuda"
    cast = torch.compile(to_float8, dynamic=False) if on_gpu else to_float8

    def casts() -> tuple[tuple, tuple, tuple]:
        return cast(x, FORWARD), cast(weight, FORWARD), cast(grad, GRADIENT)

    sides = casts()
    plain = _ms(lambda: (x @ weight.T, grad @ weight, grad.T @ x), device)
    small = _ms(lambda: forward_and_gradients(*sides), device)
    casting = _ms(casts, device)
    exact = x.float() @ weight.float().T
    error = (forward_and_gradients(*sides)[0].float() - exact).norm() / exact.norm()
    return dict(zip(MEASURED, (plain, small, casting, plain - small - casting, float(error)), strict=True))


def _ms(work: Callable[[], object], device: torch.device) -> float:
    work()
    return 1000 * statistics.median(device_seconds_of(work, device, IN_A_ROW) for _ in range(REPEATS))
