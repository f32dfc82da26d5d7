"""The small operations between the matrix products, each in the form that its device runs fastest.

On a GPU torch has fused kernels, the compiler makes them, or they are in fused_*.py. On a CPU each torch operation is a pass
over memory and its generic gradient several more: written out by hand they train the local profile's model 1.3x faster
(bfloat16, T = 256).
"""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
EPSILON = 1e-6
# Up to here a CPU is faster with the whole square of scores than with torch's flash attention: at T = 256 forward and
# backward of 3 heads of 64 take 4.5 ms against 9.9 ms.
SQUARE_TOKENS = 512

KERNELS = ("loss", "projection", "mlp")
_in_use = dict.fromkeys(KERNELS, True)


def fused(kernel: str, x: Tensor) -> bool:
    """Is this package's Triton kernel, one of KERNELS, to be used for `x`? Elsewhere torch's operations are."""
    if not (HAS_TRITON and x.device.type == "cuda" and _in_use[kernel]):
        return False
    return kernel != "mlp" or (x.dtype == torch.bfloat16 and x.size(-1) % 8 == 0 and _is_hopper(x.device))


@contextlib.contextmanager
def only_kernels(*names: str) -> Iterator[None]:
    """Within it no other Triton kernels of this package are used: to measure what each of them gives."""
    before = dict(_in_use)
    _in_use.update({name: name in names for name in before})
    try:
        yield
    finally:
        _in_use.update(before)


@torch.compiler.assume_constant_result
def _is_hopper(device: torch.device) -> bool:
    """Has it tensor descriptors, and the shared memory that the MLP's tiles were chosen for?"""
    return torch.cuda.get_device_capability(device)[0] == 9


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a learnt gain (Zhang & Sennrich 2019)."""
    if x.device.type == "cpu":
        return _Norm.apply(x)
    return F.rms_norm(x, (x.size(-1),), eps=EPSILON)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021)."""
    return _SquaredRelu.apply(x) if x.device.type == "cpu" else F.relu(x).square()


def tanh_(x: Tensor) -> Tensor:
    """tanh in place; on a CPU as 2 sigmoid(2x) - 1, which is vectorised (7x) and off by 2e-7 at most."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1) if x.device.type == "cpu" else x.tanh_()


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """queries (B, H, T, D), keys and values (B, KV, T, D), KV divides H -> (B, H, T, D); position t sees 0..t."""
    grouped, tokens = queries.size(1) != keys.size(1), queries.size(2)
    if queries.device.type != "cpu" or tokens > SQUARE_TOKENS:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
    if grouped:
        keys, values = (side.repeat_interleave(queries.size(1) // side.size(1), dim=1) for side in (keys, values))
    future = torch.full((tokens, tokens), float("-inf"), dtype=queries.dtype).triu(1)
    scores = (queries * queries.size(-1) ** -0.5) @ keys.mT + future
    return scores.softmax(-1) @ values


class _Norm(torch.autograd.Function):
    """y = x r with r = 1 / rms(x):  dx = r (g - y mean(g y))."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = length.square_().div_(x.size(-1)).add_(EPSILON).rsqrt_().to(x.dtype)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse)


class _SquaredRelu(torch.autograd.Function):
    """y = max(x, 0)^2:  dx = 2 max(x, 0) g."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)
