"""Triton kernels of a pass over whole prompts: what stands between its matrix products and attention, which are torch's."""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm


@triton.jit(do_not_specialize=["tokens", "length"])
def turn(
    qkv,  # (P, T, STRIDE): H + 2 KV heads of D; GATED: then KV gates
    turned,  # (P, T, H + 2 KV, D): queries and keys, turned and normed, and values
    keys,  # (rows, L, KV, D), the engine's cache
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
):
    """Turn and norm the queries and keys of one token, store its keys and values (GATED: with their embedding). Grid (T, P)."""
    t, prompt = tl.program_id(0), tl.program_id(1)
    head, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    token = prompt * tokens + t
    start = qkv + token.to(tl.int64) * STRIDE
    source = start + head * D
    here = head < HEADS + 2 * KV_HEADS
    plain = tl.load(source + d, mask=here, other=0.0)
    other = tl.load(source + (d + D // 2) % D, mask=here, other=0.0).to(tl.float32)
    angle = t * (D // 2) + d % (D // 2)
    side = tl.where(d < D // 2, 1.0, -1.0) * tl.load(sin + angle).to(tl.float32)
    whole = plain.to(tl.float32) * tl.load(cos + angle).to(tl.float32) + other * side
    whole *= tl.rsqrt(tl.sum(whole * whole, 1) / D + EPSILON)[:, None]
    rounded = whole.to(turned.dtype.element_ty)
    is_key, is_value = (head >= HEADS) & (head < HEADS + KV_HEADS), (head >= HEADS + KV_HEADS) & here
    if GATED:
        value_head = head - HEADS - KV_HEADS
        share = 3 * tl.sigmoid(tl.load(start + (HEADS + 2 * KV_HEADS) * D + value_head, mask=is_value).to(tl.float32))
        id = tl.load(ids + prompt * stride + t)
        added = tl.load(embedding + (id * KV_HEADS + value_head) * D + d, mask=is_value, other=0.0)
        plain = (plain.to(tl.float32) + share * added.to(tl.float32)).to(plain.dtype)
    target = turned + token.to(tl.int64) * (HEADS + 2 * KV_HEADS) * D + head * D + d
    tl.store(target, tl.where(is_value, plain, rounded), mask=here)
    if t < tl.load(lengths + prompt * stride):
        place = (tl.load(rows + prompt * stride) * length + t) * KV_HEADS * D + d
        tl.store(keys + place + (head - HEADS) * D, rounded, mask=is_key)
        tl.store(values + place + (head - HEADS - KV_HEADS) * D, plain, mask=is_value)


@triton.jit
def squared_relu_(x, BLOCK: tl.constexpr, size):
    """relu(x)^2 in place, over `size` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < size, other=0.0).to(tl.float32), 0.0)
    tl.store(x + at, (value * value).to(x.dtype.element_ty), mask=at < size)
