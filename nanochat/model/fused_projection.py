"""Queries, keys and values on a GPU: the product, then the rotation and norm of queries and keys in place, in one kernel each
way.

Of the projection only its result stays for the backward pass, with the inverse lengths of queries and keys. With x the product's
row of one head, R its rotation, y = r R x, r = 1 / rms(x):  dx = R^T r (g - y mean(g y)).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from nanochat.model.kernels import EPSILON

TOKENS, WARPS = 32, 4  # of a program; the fastest on an H100 of six choices, for heads of 64 and of 128


@triton.jit
def _halves(row, columns, HALF: tl.constexpr, inside):
    """The two halves of heads, float32: pointers `row` (n, 1), `columns` (1, half)."""
    first = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(row + columns + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(
    qkv, cos, sin, inverses, tokens, length, cos_row_stride, epsilon,
    TURNED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens: the first TURNED of HEADS heads are rotated and normed in place; `inverses` (TURNED, tokens)."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)[None, :]
    exists = token < tokens
    inside = exists[:, None] & (columns < HALF)
    angle = ((token // length) * cos_row_stride + (token % length) * HALF)[:, None] + columns
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    for head in range(TURNED):
        row = qkv + ((token * HEADS + head) * (2 * HALF))[:, None]
        first, second = _halves(row, columns, HALF, inside)
        square = tl.sum(first * first + second * second, axis=1) / (2 * HALF)
        inverse = tl.rsqrt(square + epsilon)
        tl.store(inverses + head * tokens + token, inverse, mask=exists)
        r = inverse[:, None]
        tl.store(row + columns, ((first * c + second * s) * r).to(qkv.dtype.element_ty), mask=inside)
        tl.store(row + columns + HALF, ((second * c - first * s) * r).to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back_head(
    source, row, out, inverse, c, s, columns, inside, NORMED: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """One head of a block of tokens: the gradient at `source` becomes that of the product, at `out`."""
    first, second = _halves(source, columns, HALF, inside)
    if NORMED:
        y_first, y_second = _halves(row, columns, HALF, inside)
        along = (tl.sum(first * y_first + second * y_second, axis=1) / (2 * HALF))[:, None]
        g_first, g_second = (first - y_first * along) * inverse, (second - y_second * along) * inverse
        first, second = g_first * c - g_second * s, g_second * c + g_first * s
    tl.store(out + columns, first.to(out.dtype.element_ty), mask=inside)
    tl.store(out + columns + HALF, second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(
    grad_queries, grad_keys, grad_values, qkv, cos, sin, inverses, grad_qkv, tokens, length, cos_row_stride,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens: the gradients of queries, keys and values become that of the fused product, all heads."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)[None, :]
    exists = token < tokens
    inside = exists[:, None] & (columns < HALF)
    batch, position = token // length, token % length
    angle = (batch * cos_row_stride + position * HALF)[:, None] + columns
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    line = token * ((QUERIES + 2 * KEYS) * 2 * HALF)
    for head in range(QUERIES):
        source = (grad_queries + batch * q_row + position * q_token + head * q_head)[:, None]
        at = (line + head * 2 * HALF)[:, None]
        r = tl.load(inverses + head * tokens + token, mask=exists, other=0.0)[:, None]
        _turn_back_head(source, qkv + at, grad_qkv + at, r, c, s, columns, inside, True, HALF)
    for head in range(KEYS):
        source = (grad_keys + batch * k_row + position * k_token + head * k_head)[:, None]
        at = (line + (QUERIES + head) * 2 * HALF)[:, None]
        r = tl.load(inverses + (QUERIES + head) * tokens + token, mask=exists, other=0.0)[:, None]
        _turn_back_head(source, qkv + at, grad_qkv + at, r, c, s, columns, inside, True, HALF)
    for head in range(KEYS):
        source = (grad_values + batch * v_row + position * v_token + head * v_head)[:, None]
        at = (line + (QUERIES + KEYS + head) * 2 * HALF)[:, None]
        _turn_back_head(source, qkv + at, grad_qkv + at, 0.0, c, s, columns, inside, False, HALF)


def turn_(qkv: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """Rotate and norm the first `turned` heads of qkv (B, T, heads, D) in place.

    cos, sin  (1 or B, T, 1, D/2)
    returns   (turned, B x T) float32, the factors of the norm
    """
    rows, length, heads, head_dim = qkv.shape
    assert qkv.is_contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, half = rows * length, head_dim // 2
    inverses = torch.empty(turned, tokens, dtype=torch.float32, device=qkv.device)
    _turn[(triton.cdiv(tokens, TOKENS),)](
        qkv, cos, sin, inverses, tokens, length, _row_stride(cos), EPSILON,
        TURNED=turned, HEADS=heads, HALF=half, COLUMNS=triton.next_power_of_2(half), BLOCK=TOKENS, num_warps=WARPS,
    )  # fmt: skip
    return inverses


def turn_back(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, inverses: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:  # fmt: skip
    """The gradient of the product, (B, T, heads, D).

    grads     of queries (B, T, H, D), keys and values (B, T, KV, D), with any strides but of the last dimension
    qkv       (B, T, H + 2 KV, D) as `turn_` left it
    inverses  what it returned
    """
    queries, keys, values = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
    rows, length, _, head_dim = qkv.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, half = rows * length, head_dim // 2
    grad_qkv = torch.empty_like(qkv)
    _turn_back[(triton.cdiv(tokens, TOKENS),)](
        queries, keys, values, qkv, cos, sin, inverses, grad_qkv, tokens, length, _row_stride(cos),
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        QUERIES=queries.size(2), KEYS=keys.size(2), HALF=half, COLUMNS=triton.next_power_of_2(half), BLOCK=TOKENS,
        num_warps=WARPS,
    )  # fmt: skip
    return grad_qkv


def _row_stride(table: Tensor) -> int:
    return 0 if table.size(0) == 1 else table.stride(0)


@library.custom_op("nanochat::project_and_turn", mutates_args=())
def project_and_turn(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """x (B, T, C) times weight ((H + 2 KV) D, C), then `turn_` of queries and keys: (B, T, H + 2 KV, D) and its factors."""
    qkv = F.linear(x, weight).view(x.size(0), x.size(1), heads + 2 * kv_heads, -1)
    return qkv, turn_(qkv, cos, sin, heads + kv_heads)


@project_and_turn.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    rows, length, _ = x.shape
    total = heads + 2 * kv_heads
    qkv = x.new_empty(rows, length, total, weight.size(0) // total)
    return qkv, x.new_empty(heads + kv_heads, rows * length, dtype=torch.float32)


@library.custom_op("nanochat::turn_back", mutates_args=())
def turn_back_op(
    grad_queries: Tensor, grad_keys: Tensor, grad_values: Tensor, qkv: Tensor, inverses: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:  # fmt: skip
    """`turn_back` as one operation to the compiler."""
    return turn_back((grad_queries, grad_keys, grad_values), qkv, inverses, cos, sin)


@turn_back_op.register_fake
def _(grad_queries, grad_keys, grad_values, qkv, inverses, cos, sin) -> Tensor:
    return torch.empty_like(qkv)


class Projection(torch.autograd.Function):
    """x (B, T, C) -> queries (B, T, H, D), keys and values (B, T, KV, D): views of one tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int):
        qkv, inverses = project_and_turn(x, weight, cos, sin, heads, kv_heads)
        ctx.save_for_backward(x, weight, qkv, inverses, cos, sin)
        return qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads], qkv[:, :, heads + kv_heads :]

    @staticmethod
    def backward(ctx, grad_queries: Tensor, grad_keys: Tensor, grad_values: Tensor):
        x, weight, qkv, inverses, cos, sin = ctx.saved_tensors
        grad = turn_back_op(grad_queries, grad_keys, grad_values, qkv, inverses, cos, sin).flatten(0, 1).flatten(1)
        grad_x = (grad @ weight).view_as(x)
        return grad_x, grad.T @ x.flatten(0, 1), None, None, None, None
