"""The small operations between the matrix products, each in the form that its device runs fastest.

On a GPU torch has fused kernels, the compiler makes them, or they are in fused_*.py. On a CPU each torch operation is a pass
over memory and its generic gradient several more: written out by hand they train the local profile's model 1.3x faster
(bfloat16, T = 256).
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

HAS_TRITON = importlib.util.find_spec("triton") is not None
EPSILON = 1e-6
# Up to here a CPU is faster with the whole square of scores than with torch's flash attention: at T = 256 forward and
# backward of 3 heads of 64 take 4.5 ms against 9.9 ms.
SQUARE_TOKENS = 512
BLOCK_TOKENS = 128  # of queries and of keys: the blocks that are skipped outside a window
# Queries at least: with pieces of 64 a training step at T = 256 is 4% slower than with the square.
PIECE_TOKENS = 128

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


def lookup(table: Tensor, tokens: Tensor) -> Tensor:
    """The tokens' rows of a table: (V, C), (B, T) int64 -> (B, T, C)."""
    return _Lookup.apply(table, tokens) if table.device.type == "cpu" else F.embedding(tokens, table)


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


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, window: int | None = None, blocks: BlockMask | None = None
) -> Tensor:
    """queries (B, H, T, D), keys and values (B, KV, T, D), KV divides H -> (B, H, T, D).

    Position t sees t-window+1..t, without a window 0..t.
    blocks  `window_blocks` of it: those that no query sees are skipped. In compiled code only: eagerly all of the square is
            computed, and kept. None: a window goes through FlashAttention, or where that does not serve, if much shorter than
            T, in pieces
    """
    grouped, tokens = queries.size(1) != keys.size(1), queries.size(2)
    if blocks is not None:
        return flex_attention(queries, keys, values, block_mask=blocks, enable_gqa=grouped)
    whole = window is None or window >= tokens
    on_cpu = queries.device.type == "cpu" and tokens <= SQUARE_TOKENS
    if whole and not on_cpu:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
    if grouped:  # torch's attention would, given a mask, keep the whole square of scores for that
        keys, values = (side.repeat_interleave(queries.size(1) // side.size(1), dim=1) for side in (keys, values))
    if window is not None and _flash_serves(queries):
        return _in_flash(queries, keys, values, window)
    if window is not None and tokens > 2 * max(window, PIECE_TOKENS):
        return _in_pieces(queries, keys, values, window)
    positions = torch.arange(tokens, device=queries.device)
    return _masked(queries, keys, values, seen(positions[:, None], positions, window))


def _flash_serves(queries: Tensor) -> bool:
    """FlashAttention-2: halves on an Ampere GPU or newer, heads of 8, 16, ... 256. In compiled code FlexAttention is faster."""
    if queries.device.type != "cuda" or queries.dtype == torch.float32 or torch.compiler.is_compiling():
        return False
    return queries.size(-1) in range(8, 257, 8) and torch.cuda.get_device_capability(queries.device)[0] >= 8


def _in_flash(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """`causal_attention` by torch's varlen_attn, of its kernels the one that knows windows. Sides that lie as (B, T, H, D) are not copied."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = queries.shape
    starts = torch.arange(0, (rows + 1) * length, length, device=queries.device, dtype=torch.int32)
    packed = [side.transpose(1, 2).flatten(0, 1) for side in (queries, keys, values)]  # (B T, H, D)
    attended = varlen_attn(*packed, starts, starts, length, length, window_size=(window - 1, 0))
    return attended.unflatten(0, (rows, length)).transpose(1, 2)


def _in_pieces(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """`causal_attention` in pieces of the queries, each of which sees the keys of its own piece and of the one before: (B, H, T, D)."""
    tokens, size = queries.size(2), max(window, PIECE_TOKENS)
    count = -(-tokens // size)
    if count * size > tokens:  # what is added stands behind all others, which do not see it
        queries, keys, values = (F.pad(side, (0, 0, 0, count * size - tokens)) for side in (queries, keys, values))

    def pieces(side: Tensor) -> Tensor:
        return side.unflatten(2, (count, size)).permute(0, 2, 1, 3, 4)  # (B, pieces, H, size, D)

    def with_those_before(side: Tensor) -> Tensor:
        side = pieces(side)
        before = F.pad(side[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        return torch.cat((before, side), dim=3).flatten(0, 1)  # (B pieces, H, 2 size, D)

    positions = torch.arange(2 * size, device=queries.device)
    mask = seen(positions[size:, None], positions, window).repeat(count, 1, 1)
    mask[0, :, :size] = False  # before the first piece there is nothing
    mask = mask[:, None].repeat(queries.size(0), 1, 1, 1)  # (B pieces, 1, size, 2 size)
    attended = _masked(pieces(queries).flatten(0, 1), with_those_before(keys), with_those_before(values), mask)
    attended = attended.unflatten(0, (-1, count)).permute(0, 2, 1, 3, 4)
    return attended.flatten(2, 3)[:, :, :tokens]


def _masked(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of queries (B, H, T, D) to keys and values (B, H, S, D) where `mask` is true: (T, S), or (B, 1, T, S)."""
    if queries.device.type != "cpu" or keys.size(2) > SQUARE_TOKENS:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    unseen = torch.zeros(mask.shape, dtype=queries.dtype).masked_fill(~mask, float("-inf"))
    scores = (queries * queries.size(-1) ** -0.5) @ keys.mT + unseen
    return scores.softmax(-1) @ values


def seen(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Which positions of keys those of queries attend to: bool, of the shape that both broadcast to."""
    causal = keys <= queries
    return causal if window is None else causal & (keys > queries - window)


def window_blocks(length: int, window: int | None, head_dim: int, device: torch.device) -> BlockMask | None:
    """The blocks of (length, length) scores that a window needs; None where there is no window, or FlexAttention does not serve.

    It does not on a CPU (no gradient), for heads under 16, nor within a single block, of which nothing can be skipped.
    """
    if window is None or device.type != "cuda" or head_dim < 16 or length < BLOCK_TOKENS:
        return None
    return _blocks(length, window, device)


@functools.lru_cache(maxsize=16)
def _blocks(length: int, window: int, device: torch.device) -> BlockMask:
    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen(query, key, window)

    return create_block_mask(mask, None, None, length, length, device, BLOCK_TOKENS)


@library.custom_op("nanochat::lookup_gradient", mutates_args=())
def lookup_gradient(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """(B, T, C), (B, T) -> (rows, C). One operation to the compiler: on a CPU it would make atomic additions of it by several
    threads, in whatever order they come, and no training would come out the same twice. Here each thread has its own rows.
    """
    return torch.ops.aten.embedding_dense_backward(grad, tokens, rows, -1, False)


@lookup_gradient.register_fake
def _(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    return grad.new_empty(rows, grad.size(-1))


class _Lookup(torch.autograd.Function):
    """F.embedding, whose gradient is `lookup_gradient`."""

    @staticmethod
    def forward(ctx, table: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = table.size(0)
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        return lookup_gradient(grad, tokens, ctx.rows), None


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
