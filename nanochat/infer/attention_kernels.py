"""Triton kernels of a decode step's attention: one query a row, over the filled part of a cache.

What a row gets depends on nothing but its own numbers; nothing is added atomically. See `decode_kernels` for what starts before what.

Shapes: R rows, H heads, KV heads of keys, D head size, L cache length.
"""

import triton
import triton.language as tl

from nanochat.infer.dependent_launch import start, wait

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length", "capacity"])
def attend(
    qkv,  # (R, STRIDE): 3 H heads of D, of queries, keys and values; GATED: then H gates
    keys,  # (rows, L, H, D), as KVCache lays them out: (rows, H, L, D) in memory
    values,
    out,  # (R, H, D); SPLITS > 1: (SPLITS, capacity, H, D) float32, not normalised
    totals,  # SPLITS > 1: (SPLITS, capacity, H) float32, sums of exponentials
    cos,  # (positions, D / 2)
    sin,
    position,  # (R,) int64, of the new token
    running,  # (R,) bool
    token,  # (R,) int64, the new token   ]
    embedding,  # (V, H, D), of values    ] for GATED
    length,  # L
    capacity,
    STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a query sees, its own among them; 0: all
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LINES: tl.constexpr,  # of a tile's positions that all threads together read at once; divides BLOCK_T
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,  # tiles in registers, on their way or there: from before the wait on
    STAGES: tl.constexpr,  # HELD = 0: tiles on their way through shared memory
    PDL: tl.constexpr,
):
    """Turn, norm and store the new key, store the new value (GATED: with its embedding), attend to the filled part of the row. Grid (R, H, SPLITS).

    The filled positions that it sees are divided among the splits in whole tiles; the new token belongs to the first split. A row that
    has halted reads and stores nothing. Every head has keys of its own; where several share them it is `attend_in_groups`.

    A tile is (LINES, BLOCK_T / LINES, D), and a thread has the same places of D in all of its positions. So it loads these of the query,
    the new key and value itself, and has sums of its own: nothing passes between threads but what a score needs, until all are added up.
    Numbers are loaded two in a word, and D is cut into evens and odds: the compiler takes tiles that stay in registers from one round of a
    loop to the next apart into their numbers, and waits for them to do so.
    """
    start(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    alive, here, first, last = _seen(position, running, row, split, length, WINDOW, SPLITS, BLOCK_T)
    side = (row.to(tl.int64) * HEADS + head) * length * D
    keys += side
    values += side
    WORDS: tl.constexpr = D // 2
    DTYPE: tl.constexpr = keys.dtype.element_ty
    line = tl.arange(0, LINES)[:, None]
    t = line + tl.arange(0, BLOCK_T // LINES)[None, :] * LINES
    word = tl.arange(0, WORDS)[None, None, :]
    at = t[:, :, None] * WORDS + word
    held_k, held_v = (), ()
    for tile in tl.static_range(HELD):
        there = (first + tile * BLOCK_T + t < last)[:, :, None]
        held_at = (first + tile * BLOCK_T) * WORDS + at
        held_k = held_k + (tl.load(_words(keys) + held_at, mask=there, other=0),)  # noqa: RUF005
        held_v = held_v + (tl.load(_words(values) + held_at, mask=there, other=0),)  # noqa: RUF005
    own = line[:, :, None] * 0 + word  # (LINES, 1, WORDS), the same in each line
    turn_at, sign = here * (WORDS // 2) + own % (WORDS // 2), tl.where(own < WORDS // 2, 1.0, -1.0)
    turn_cos, turn_sin = tl.load(_words(cos) + turn_at), tl.load(_words(sin) + turn_at)
    added = own
    if GATED:
        added = tl.load(_words(embedding + (tl.load(token + row) * HEADS + head) * D) + own)
    wait(PDL)
    q_at = qkv + row * STRIDE + head * D
    q = _turned(q_at, own, turn_cos, turn_sin, sign, WORDS, DTYPE)
    new_k = _turned(q_at + HEADS * D, own, turn_cos, turn_sin, sign, WORDS, DTYPE)
    new_v = _halves(tl.load(_words(q_at + 2 * HEADS * D) + own), DTYPE)
    if GATED:
        share = 3 * tl.sigmoid(tl.load(qkv + row * STRIDE + 3 * HEADS * D + head).to(tl.float32))
        more = _halves(added, DTYPE)
        new_v = (
            (new_v[0] + share * more[0]).to(DTYPE).to(tl.float32),
            (new_v[1] + share * more[1]).to(DTYPE).to(tl.float32),
        )
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    SHIFT: tl.constexpr = SCALE * D - 15.0 if SCALE * D > 15.0 else 0.0  # as `attend_in_groups` says
    owner, once = split == 0, line == 0
    if owner & alive:
        tl.store(_words(keys) + here * WORDS + own, _joined(new_k, DTYPE), mask=once[:, :, None])
        tl.store(_words(values) + here * WORDS + own, _joined(new_v, DTYPE), mask=once[:, :, None])
    score = tl.sum(q[0] * new_k[0] + q[1] * new_k[1], 2)
    p = tl.where(once & owner, tl.exp2(score * SCALE - SHIFT), 0.0)  # (LINES, 1)
    total = tl.sum(p, 1)  # (LINES,)
    evens, odds = tl.sum(p[:, :, None] * new_v[0], 1), tl.sum(p[:, :, None] * new_v[1], 1)  # (LINES, WORDS)
    if HELD == 0:
        for begin in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            seen = begin + t < last
            k = tl.load(_words(keys) + begin * WORDS + at, mask=seen[:, :, None], other=0)
            v = tl.load(_words(values) + begin * WORDS + at, mask=seen[:, :, None], other=0)
            total, evens, odds = _attend_tile(q, k, v, seen, total, evens, odds, SCALE, SHIFT, DTYPE)
    else:
        for begin in tl.range(first, last, HELD * BLOCK_T, num_stages=1):
            coming_k, coming_v = (), ()
            for tile in tl.static_range(HELD):
                now = begin + tile * BLOCK_T
                total, evens, odds = _attend_tile(
                    q, held_k[tile], held_v[tile], now + t < last, total, evens, odds, SCALE, SHIFT, DTYPE
                )
                # Its registers take the tile that comes HELD later.
                there = (now + HELD * BLOCK_T + t < last)[:, :, None]
                coming_at = (now + HELD * BLOCK_T) * WORDS + at
                coming_k = coming_k + (tl.load(_words(keys) + coming_at, mask=there, other=0),)  # noqa: RUF005
                coming_v = coming_v + (tl.load(_words(values) + coming_at, mask=there, other=0),)  # noqa: RUF005
            held_k, held_v = coming_k, coming_v
    # All at once: each sum over lines for itself would pass through shared memory for itself.
    total, evens, odds = tl.reduce((total[:, None] + tl.zeros_like(evens), evens, odds), 0, _added)
    place, word = row * HEADS + head, tl.arange(0, WORDS)
    if SPLITS == 1:
        evens, odds = evens / total, odds / total
    else:
        place += split * capacity * HEADS
        tl.store(totals + place + word * 0, total, mask=word == 0)
    tl.store(_words(out) + place * WORDS + word, _joined((evens, odds), out.dtype.element_ty))


@triton.jit
def _added(total, even, odd, other_total, other_even, other_odd):
    return total + other_total, even + other_even, odd + other_odd


@triton.jit
def _words(pointer):
    """The same place, to be read two numbers at once."""
    WORD: tl.constexpr = tl.int32 if pointer.dtype.element_ty.primitive_bitwidth == 16 else tl.int64
    return pointer.to(tl.pointer_type(WORD), bitcast=True)


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two numbers of each word, in float32."""
    if dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        HALF: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
        low, high = word.to(HALF), (word >> dtype.primitive_bitwidth).to(HALF)
        return low.to(dtype, bitcast=True).to(tl.float32), high.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _joined(halves, DTYPE: tl.constexpr):
    """Words of two numbers each."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    HALF: tl.constexpr = tl.uint16 if BITS == 16 else tl.uint32
    WORD: tl.constexpr = tl.int32 if BITS == 16 else tl.int64
    low, high = (
        halves[0].to(DTYPE).to(HALF, bitcast=True).to(WORD),
        halves[1].to(DTYPE).to(HALF, bitcast=True).to(WORD),
    )
    return low | (high << BITS)


@triton.jit
def _turned(source, own, turn_cos, turn_sin, sign, WORDS: tl.constexpr, DTYPE: tl.constexpr):
    """The query or key that stands there, turned, normed and rounded as the cache rounds keys and the model queries: evens, odds."""
    straight = _halves(tl.load(_words(source) + own), DTYPE)
    across = _halves(tl.load(_words(source) + (own + WORDS // 2) % WORDS), DTYPE)
    turn_cos, turn_sin = _halves(turn_cos, DTYPE), _halves(turn_sin, DTYPE)
    even = straight[0] * turn_cos[0] + across[0] * turn_sin[0] * sign
    odd = straight[1] * turn_cos[1] + across[1] * turn_sin[1] * sign
    scale = tl.rsqrt(tl.sum(even * even + odd * odd, 2) / (2 * WORDS) + EPSILON)[:, :, None]
    return (even * scale).to(DTYPE).to(tl.float32), (odd * scale).to(DTYPE).to(tl.float32)


@triton.jit
def _attend_tile(q, k, v, seen, total, evens, odds, SCALE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """One tile of keys and values joins the sums: (LINES, n, WORDS), seen (LINES, n), total (LINES,), evens and odds (LINES, WORDS)."""
    k, v = _halves(k, DTYPE), _halves(v, DTYPE)
    p = tl.where(seen, tl.exp2(tl.sum(k[0] * q[0] + k[1] * q[1], 2) * SCALE - SHIFT), 0.0)
    return total + tl.sum(p, 1), evens + tl.sum(p[:, :, None] * v[0], 1), odds + tl.sum(p[:, :, None] * v[1], 1)


@triton.jit
def _seen(
    position, running, row, split, length, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Whether a row runs, where its new token stands, and which of the positions before that belong to a split: first, behind the last."""
    alive = tl.load(running + row).to(tl.int1)
    here = tl.minimum(tl.load(position + row), length - 1).to(tl.int32)
    filled = tl.where(alive, here, 0)
    oldest = tl.maximum(filled - (WINDOW - 1), 0) if WINDOW else filled * 0
    chunk = tl.cdiv(tl.cdiv(filled - oldest, SPLITS), BLOCK_T) * BLOCK_T
    first = oldest + split * chunk
    return alive, here, first, tl.minimum(first + chunk, filled)


@triton.jit(do_not_specialize=["length", "capacity"])
def attend_in_groups(
    qkv,  # (R, STRIDE): H + 2 KV heads of D; GATED: then KV gates
    keys,  # (rows, L, KV, D), and all that follows as in `attend`, with KV heads of keys and values
    values,
    out,
    totals,
    cos,
    sin,
    position,
    running,
    token,
    embedding,
    length,
    capacity,
    STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # queries of one head of keys, padded to a tensor core's tile
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    HELD: tl.constexpr,  # tiles fetched into registers before the wait
    STAGES: tl.constexpr,  # tiles in flight of those that follow
    PDL: tl.constexpr,
):
    """`attend` where several queries share a head of keys, on tensor cores. Grid (R, KV, SPLITS)."""
    start(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d, query, t = tl.arange(0, D), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_T)
    alive, here, first, last = _seen(position, running, row, split, length, WINDOW, SPLITS, BLOCK_T)
    side = (row.to(tl.int64) * KV_HEADS + head) * length * D
    keys += side
    values += side
    at = t[:, None] * D + d[None, :]
    held_k, held_v = (), ()
    for tile in tl.static_range(HELD):
        seen = first + tile * BLOCK_T + t < last
        held_at = (first + tile * BLOCK_T) * D + at
        held_k = held_k + (tl.load(keys + held_at, mask=seen[:, None], other=0.0),)  # noqa: RUF005
        held_v = held_v + (tl.load(values + held_at, mask=seen[:, None], other=0.0),)  # noqa: RUF005
    turn_cos = tl.load(cos + here * (D // 2) + d % (D // 2)).to(tl.float32)
    turn_sin = tl.load(sin + here * (D // 2) + d % (D // 2)).to(tl.float32)
    turn_sin = tl.where(d < D // 2, turn_sin, -turn_sin)
    other = (d + D // 2) % D
    if GATED:
        added = tl.load(embedding + (tl.load(token + row) * KV_HEADS + head) * D + d)
    wait(PDL)
    qkv += row * STRIDE
    real = (query < GROUP)[:, None]
    q_at = qkv + (head * GROUP + query)[:, None] * D
    q = tl.load(q_at + d[None, :], mask=real, other=0.0).to(tl.float32) * turn_cos[None, :]
    q += tl.load(q_at + other[None, :], mask=real, other=0.0).to(tl.float32) * turn_sin[None, :]
    q = (q * tl.rsqrt(tl.sum(q * q, 1) / D + EPSILON)[:, None]).to(keys.dtype.element_ty)
    k_at = qkv + (HEADS + head) * D
    new_k = tl.load(k_at + d).to(tl.float32) * turn_cos + tl.load(k_at + other).to(tl.float32) * turn_sin
    new_k = (new_k * tl.rsqrt(tl.sum(new_k * new_k, 0) / D + EPSILON)).to(keys.dtype.element_ty)
    new_v = tl.load(qkv + (HEADS + KV_HEADS + head) * D + d)
    if GATED:
        share = 3 * tl.sigmoid(tl.load(qkv + (HEADS + 2 * KV_HEADS) * D + head).to(tl.float32))
        new_v = (new_v.to(tl.float32) + share * added.to(tl.float32)).to(new_v.dtype)
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    # Queries and keys are normed, so a score is sqrt(D) at most and its exponential fits: no maximum is subtracted. In float16
    # it fits up to 2^15.
    SHIFT: tl.constexpr = SCALE * D - 15.0 if SCALE * D > 15.0 else 0.0
    owner = split == 0
    if owner & alive:
        tl.store(keys + here * D + d, new_k)
        tl.store(values + here * D + d, new_v)
    p = tl.exp2(tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * SCALE - SHIFT)  # (BLOCK_G,)
    total = tl.where(owner, p, 0.0)
    mixed = tl.where(owner, p[:, None] * new_v.to(tl.float32)[None, :], 0.0)
    for tile in tl.static_range(HELD):
        begin = first + tile * BLOCK_T
        if begin < last:
            total, mixed = _attend_tile_of_groups(
                q, held_k[tile], held_v[tile], begin + t < last, total, mixed, SCALE, SHIFT
            )
    for begin in tl.range(first + HELD * BLOCK_T, last, BLOCK_T, num_stages=STAGES):
        seen = begin + t < last
        k = tl.load(keys + begin * D + at, mask=seen[:, None], other=0.0)
        v = tl.load(values + begin * D + at, mask=seen[:, None], other=0.0)
        total, mixed = _attend_tile_of_groups(q, k, v, seen, total, mixed, SCALE, SHIFT)
    place = row * HEADS + head * GROUP + query
    if SPLITS == 1:
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place[:, None] * D + d[None, :], result, mask=real)
    else:
        place += split * capacity * HEADS
        tl.store(out + place[:, None] * D + d[None, :], mixed, mask=real)
        tl.store(totals + place, total, mask=query < GROUP)


@triton.jit
def _attend_tile_of_groups(q, k, v, seen, total, mixed, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """One tile of keys and values joins the sums of all queries: (BLOCK_T, D), total (BLOCK_G,), mixed (BLOCK_G, D)."""
    p = tl.where(seen[None, :], tl.exp2(tl.dot(q, k.T) * SCALE - SHIFT), 0.0)  # (BLOCK_G, BLOCK_T)
    return total + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, mixed)


@triton.jit(do_not_specialize=["capacity"])
def merge(parts, totals, out, capacity, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """Join the splits of `attend` in their order: out (R, H, D). Grid (R, H)."""
    start(PDL)
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    wait(PDL)
    total, mixed = 0.0, tl.zeros((D,), tl.float32)
    for split in tl.static_range(SPLITS):
        place = (split * capacity + row) * HEADS + head
        total += tl.load(totals + place)
        mixed += tl.load(parts + place * D + d)
    tl.store(out + (row * HEADS + head) * D + d, (mixed / total).to(out.dtype.element_ty))
