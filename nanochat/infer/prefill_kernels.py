"""Triton kernels of a pass over whole prompts: what stands between its matrix products and attention, which are torch's.

The stream goes into a product as it is. A norm without gains is one factor a token, which the kernel behind the product applies:
so there is no pass over the stream for the norm alone.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm


@triton.jit
def _factor(x, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """That of norm(x) for the row that stands there."""
    at = tl.arange(0, BLOCK_WIDTH)
    row = tl.load(x + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(row * row, 0) / WIDTH + EPSILON)


@triton.jit(do_not_specialize=["tokens", "length"])
def turn(
    x,  # (P, T, WIDTH), the stream
    qkv,  # (P, T, STRIDE), its product: H + 2 KV heads of D; GATED: then KV gates
    turned,  # (P, T, H + 2 KV, D): queries and keys, turned and normed, and values
    keys,  # (rows, L, KV, D), the engine's cache, (rows, KV, L, D) in memory
    values,
    cos,  # (positions, D / 2)
    sin,
    rows,  # (P,) int64, the prompt's row of the cache
    lengths,  # (P,) int64, the prompt's tokens; what follows is padding and stored nowhere
    ids,  # (P, T) int64, the tokens        ]
    embedding,  # (V, KV, D), of values     ] for GATED
    stride,  # of `rows`, `lengths` and `ids`
    tokens,  # T
    length,  # L
    STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least H + 2 KV
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,  # power of two, at least WIDTH
):
    """Turn and norm the queries and keys of one token, store its keys and values (GATED: with their embedding). Grid (T, P)."""
    t, prompt = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    token = prompt * tokens + t
    start = qkv + token.to(tl.int64) * STRIDE
    source = start + head * D
    here = head < HEADS + 2 * KV_HEADS
    factor = _factor(x + token.to(tl.int64) * WIDTH, WIDTH, BLOCK_WIDTH)
    plain = tl.load(source + d, mask=here, other=0.0).to(tl.float32) * factor
    other = tl.load(source + (d + D // 2) % D, mask=here, other=0.0).to(tl.float32) * factor
    angle = t * (D // 2) + d % (D // 2)
    side = tl.where(d < D // 2, 1.0, -1.0) * tl.load(sin + angle).to(tl.float32)
    whole = plain * tl.load(cos + angle).to(tl.float32) + other * side
    whole *= tl.rsqrt(tl.sum(whole * whole, 1) / D + EPSILON)[:, None]
    rounded = whole.to(turned.dtype.element_ty)
    is_key, is_value = (head >= HEADS) & (head < HEADS + KV_HEADS), (head >= HEADS + KV_HEADS) & here
    if GATED:
        value_head = head - HEADS - KV_HEADS
        gate = tl.load(start + (HEADS + 2 * KV_HEADS) * D + value_head, mask=is_value).to(tl.float32)
        share = 3 * tl.sigmoid(gate * factor)
        id = tl.load(ids + prompt * stride + t)
        added = tl.load(embedding + (id * KV_HEADS + value_head) * D + d, mask=is_value, other=0.0)
        plain += share * added.to(tl.float32)
    value = plain.to(turned.dtype.element_ty)
    target = turned + token.to(tl.int64) * (HEADS + 2 * KV_HEADS) * D + head * D + d
    tl.store(target, tl.where(is_value, value, rounded), mask=here)
    if t < tl.load(lengths + prompt * stride):
        first = tl.load(rows + prompt * stride) * KV_HEADS - HEADS + head  # of the row's heads of keys
        tl.store(keys + (first * length + t) * D + d, rounded, mask=is_key)
        tl.store(values + ((first - KV_HEADS) * length + t) * D + d, value, mask=is_value)


@triton.jit
def squared_relu_(hidden, x, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """relu(norm factor of x times hidden)^2 in place: hidden (tokens, HIDDEN), x (tokens, WIDTH). One program a token."""
    token = tl.program_id(0).to(tl.int64)
    factor = _factor(x + token * WIDTH, WIDTH, BLOCK_WIDTH)
    for first in tl.static_range(0, HIDDEN, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = hidden + token * HIDDEN + at
        value = tl.maximum(tl.load(place, mask=at < HIDDEN, other=0.0).to(tl.float32) * factor, 0.0)
        tl.store(place, (value * value).to(hidden.dtype.element_ty), mask=at < HIDDEN)
