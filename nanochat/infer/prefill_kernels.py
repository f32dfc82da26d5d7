"""Triton kernels of a pass over whole prompts: what stands between its matrix products and attention, which are torch's."""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm


@triton.jit(do_not_specialize=["tokens", "length"])
def turn(
    qkv,  # (P, T, H + 2 KV, D)
    turned,  # (P, T, H + KV, D): queries and keys, turned and normed
    keys,  # (rows, L, KV, D), the engine's cache
    values,
    cos,  # (positions, D / 2)
    sin,
    rows,  # (P,) int64, the prompt's row of the cache
    lengths,  # (P,) int64, the prompt's tokens; what follows is padding and stored nowhere
    stride,  # of `rows` and `lengths`
    tokens,  # T
    length,  # L
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least H + 2 KV
):
    """Turn and norm the queries and keys of one token, store its keys and values. Grid (T, P)."""
    t, prompt = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    token = prompt * tokens + t
    source = qkv + token.to(tl.int64) * (HEADS + 2 * KV_HEADS) * D + head * D
    here = head < HEADS + 2 * KV_HEADS
    plain = tl.load(source + d, mask=here, other=0.0)
    other = tl.load(source + (d + D // 2) % D, mask=here, other=0.0).to(tl.float32)
    angle = t * (D // 2) + d % (D // 2)
    side = tl.where(d < D // 2, 1.0, -1.0) * tl.load(sin + angle).to(tl.float32)
    whole = plain.to(tl.float32) * tl.load(cos + angle).to(tl.float32) + other * side
    whole *= tl.rsqrt(tl.sum(whole * whole, 1) / D + EPSILON)[:, None]
    rounded = whole.to(turned.dtype.element_ty)
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    target = turned + token.to(tl.int64) * (HEADS + KV_HEADS) * D + head * D + d
    tl.store(target, rounded, mask=is_query | is_key)
    if t < tl.load(lengths + prompt * stride):
        place = (tl.load(rows + prompt * stride) * length + t) * KV_HEADS * D + d
        tl.store(keys + place + (head - HEADS) * D, rounded, mask=is_key)
        is_value = (head >= HEADS + KV_HEADS) & here
        tl.store(values + place + (head - HEADS - KV_HEADS) * D, plain, mask=is_value)


@triton.jit
def squared_relu_(x, BLOCK: tl.constexpr, size):
    """relu(x)^2 in place, over `size` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    tl.store(x + at, (value * value).to(x.dtype.element_ty), mask=at < size)
