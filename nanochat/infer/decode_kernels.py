"""Triton kernels of the decode step: five a layer (with `product_kernels`), and one each before and after.

At one row a step is a chain of some sixty small kernels that depend on each other, and what counts is how long the memory idles
between two of them. So each kernel fuses all that needs no other program's result, and with PDL
(`dependent_launch`) starts while the one before still runs: what does not depend on that one, the weights and the old keys
and values, it fetches before it waits. What says which rows run and where they stand is read before waiting too: so a step's first
product lets its followers start only after its own wait, when the step before has written that.

The stream x between the layers travels with the sums of its squares, one part for each block of columns that was written:
a norm without gains is one factor a row, which the product's epilogue applies. Nothing is added atomically; what a row gets
depends on nothing but its own numbers.

Shapes: R rows, C width, K a product's inner and N its outer size, H heads, KV heads of keys, D head size, L cache length.
"""

import triton
import triton.language as tl

from nanochat.infer.dependent_launch import fetch_positions, start, wait

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["steps", "length"])
def embed(
    token,  # (R,) int64
    column,
    steps,  # that follow until the next call: `column` moves on by so many
    embedding,  # (V, C)
    x,  # (R, C)
    squares,  # (1, R) float32
    tokens,  # (rows, L) int64, the cache's            ]
    position,  # (R,) int64                            ]
    running,  # (R,) bool                              ] for SMEAR
    gate,  # (CHANNELS,), of the smear                 ]
    scale,  # (1,)                                     ]
    length,  # L
    CHANNELS: tl.constexpr,
    SMEAR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The stream of the tokens that rows begin with: `_enter`. One program a row; launched without PDL."""
    row = tl.program_id(0)
    here = tl.load(position + row)
    alive = tl.load(running + row).to(tl.int1)
    _enter(
        tl.load(token + row), row, here, alive, embedding, x, squares, tokens, gate, scale, length, CHANNELS, SMEAR, WIDTH, BLOCK
    )  # fmt: skip
    if row == 0:
        tl.store(column, tl.load(column) + steps)


@triton.jit
def _enter(
    new,
    row,
    here,
    alive,
    embedding,
    x,
    squares,
    tokens,
    gate,
    scale,
    length,
    CHANNELS: tl.constexpr,
    SMEAR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x = norm(embedding[new]), smeared with the token before position `here`, and the sums of its squares."""
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    rounded = _normed(embedding + new * WIDTH + at, inside, WIDTH)
    if SMEAR:
        here = tl.minimum(here, length - 1)
        place = tokens + row.to(tl.int64) * length + here
        before = _normed(embedding + tl.load(place - 1, mask=here > 0, other=0) * WIDTH + at, inside, WIDTH)
        weights = tl.load(gate + at, mask=at < CHANNELS, other=0.0).to(tl.float32)
        share = tl.load(scale).to(tl.float32) * tl.sigmoid(tl.sum(weights * rounded.to(tl.float32), 0))
        smeared = rounded.to(tl.float32) + tl.where(here > 0, share, 0.0) * before.to(tl.float32)
        rounded = smeared.to(x.dtype.element_ty)
        if alive:
            tl.store(place, new)
    tl.store(x + row * WIDTH + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    tl.store(squares + row, tl.sum(wide * wide, 0))


@triton.jit
def _normed(source, inside, WIDTH: tl.constexpr):
    """norm of the row that stands there."""
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return (values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPSILON)).to(source.dtype.element_ty)


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
    AHEAD: tl.constexpr,  # positions of a piece that the L2 cache is asked for before the wait; 0: for none
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Turn, norm and store the new key, store the new value (GATED: with its embedding), attend to the filled part of the row. Grid (R, H, SPLITS).

    The filled positions that it sees are divided among the splits in whole tiles; the new token belongs to the first split. A row that
    has halted reads and stores nothing. Every head has keys of its own; where several share them it is `attend_in_groups`.

    A tile is (LINES, BLOCK_T / LINES, D), and a thread has the same places of D in all of its positions. So it loads these of the query,
    the new key and value itself, and has sums of its own: nothing passes between threads but what a score needs, until all are added up.
    """
    start(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    alive, here, first, last = _seen(position, running, row, split, length, WINDOW, SPLITS, BLOCK_T)
    side = (row.to(tl.int64) * HEADS + head) * length * D
    keys += side
    values += side
    line = tl.arange(0, LINES)[:, None]
    t = line + tl.arange(0, BLOCK_T // LINES)[None, :] * LINES
    d = tl.arange(0, D)[None, None, :]
    at = t[:, :, None] * D + d
    held_k, held_v = (), ()
    for tile in tl.static_range(HELD):
        there = (first + tile * BLOCK_T + t < last)[:, :, None]
        held_at = (first + tile * BLOCK_T) * D + at
        held_k = held_k + (tl.load(keys + held_at, mask=there, other=0.0),)  # noqa: RUF005
        held_v = held_v + (tl.load(values + held_at, mask=there, other=0.0),)  # noqa: RUF005
    if AHEAD:
        fetch_positions(keys, first + HELD * BLOCK_T, last, D, AHEAD, THREADS)
        fetch_positions(values, first + HELD * BLOCK_T, last, D, AHEAD, THREADS)
    own = line[:, :, None] * 0 + d  # (LINES, 1, D), the same in each line
    other = line[:, :, None] * 0 + (d + D // 2) % D
    turn_cos = tl.load(cos + here * (D // 2) + own % (D // 2)).to(tl.float32)
    turn_sin = tl.load(sin + here * (D // 2) + own % (D // 2)).to(tl.float32)
    turn_sin = tl.where(own < D // 2, turn_sin, -turn_sin)
    if GATED:
        added = tl.load(embedding + (tl.load(token + row) * HEADS + head) * D + own)
    wait(PDL)
    q_at = qkv + row * STRIDE + head * D
    k_at, v_at = q_at + HEADS * D, q_at + 2 * HEADS * D
    q = tl.load(q_at + own).to(tl.float32) * turn_cos + tl.load(q_at + other).to(tl.float32) * turn_sin
    new_k = tl.load(k_at + own).to(tl.float32) * turn_cos + tl.load(k_at + other).to(tl.float32) * turn_sin
    new_v = tl.load(v_at + own)
    if GATED:
        share = 3 * tl.sigmoid(tl.load(qkv + row * STRIDE + 3 * HEADS * D + head).to(tl.float32))
        new_v = (new_v.to(tl.float32) + share * added.to(tl.float32)).to(new_v.dtype)
    # Rounded as the cache rounds keys, and the model queries.
    q = (q * tl.rsqrt(tl.sum(q * q, 2) / D + EPSILON)[:, :, None]).to(keys.dtype.element_ty).to(tl.float32)
    new_k = (new_k * tl.rsqrt(tl.sum(new_k * new_k, 2) / D + EPSILON)[:, :, None]).to(keys.dtype.element_ty)
    SCALE: tl.constexpr = D**-0.5 * LOG2_E
    SHIFT: tl.constexpr = SCALE * D - 15.0 if SCALE * D > 15.0 else 0.0  # as `attend_in_groups` says
    owner, once = split == 0, line == 0
    if owner & alive:
        tl.store(keys + here * D + own, new_k, mask=once[:, :, None])
        tl.store(values + here * D + own, new_v, mask=once[:, :, None])
    p = tl.where(once & owner, tl.exp2(tl.sum(q * new_k.to(tl.float32), 2) * SCALE - SHIFT), 0.0)  # (LINES, 1)
    total, mixed = tl.sum(p, 1), tl.sum(p[:, :, None] * new_v.to(tl.float32), 1)  # (LINES,), (LINES, D)
    if HELD == 0:
        for begin in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            seen = begin + t < last
            k = tl.load(keys + begin * D + at, mask=seen[:, :, None], other=0.0)
            v = tl.load(values + begin * D + at, mask=seen[:, :, None], other=0.0)
            total, mixed = _attend_tile(q, k, v, seen, total, mixed, SCALE, SHIFT)
    else:
        for begin in tl.range(first, last, HELD * BLOCK_T, num_stages=1):
            coming_k, coming_v = (), ()
            for tile in tl.static_range(HELD):
                here_on = begin + tile * BLOCK_T
                if here_on < last:
                    total, mixed = _attend_tile(
                        q, held_k[tile], held_v[tile], here_on + t < last, total, mixed, SCALE, SHIFT
                    )
                # Its registers take the tile that comes HELD later.
                there = (here_on + HELD * BLOCK_T + t < last)[:, :, None]
                coming_at = (here_on + HELD * BLOCK_T) * D + at
                coming_k = coming_k + (tl.load(keys + coming_at, mask=there, other=0.0),)  # noqa: RUF005
                coming_v = coming_v + (tl.load(values + coming_at, mask=there, other=0.0),)  # noqa: RUF005
            held_k, held_v = coming_k, coming_v
    total, mixed = tl.sum(total, 0), tl.sum(mixed, 0)
    place = row * HEADS + head
    if SPLITS == 1:
        tl.store(out + place * D + tl.arange(0, D), (mixed / total).to(out.dtype.element_ty))
    else:
        place += split * capacity * HEADS
        tl.store(out + place * D + tl.arange(0, D), mixed)
        tl.store(totals + place, total)


@triton.jit
def _attend_tile(q, k, v, seen, total, mixed, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """One tile of keys and values joins the sums: (LINES, n, D), seen (LINES, n), total (LINES,), mixed (LINES, D)."""
    scores = tl.sum(k.to(tl.float32) * q, 2) * SCALE - SHIFT
    p = tl.where(seen, tl.exp2(scores), 0.0)
    return total + tl.sum(p, 1), mixed + tl.sum(p[:, :, None] * v.to(tl.float32), 1)


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
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
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
    if AHEAD:
        fetch_positions(keys, first + HELD * BLOCK_T, last, D, AHEAD, THREADS)
        fetch_positions(values, first + HELD * BLOCK_T, last, D, AHEAD, THREADS)
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


@triton.jit(do_not_specialize=["blocks", "burst", "behind", "length"])
def finish(
    best,  # (R, blocks) float32
    index,  # (R, blocks) int32
    given,  # (R,) int64, what was drawn, when GIVEN
    token,  # from here on the fields of decode.Rows
    position,
    remaining,
    running,
    stops,
    drawn,
    column,  # (1,) int64, `behind` columns behind where to write: `embed` has moved it
    blocks,
    burst,  # columns of drawn
    behind,
    embedding,  # as `embed` has them, for GOES_ON
    x,
    squares,
    tokens,
    gate,
    scale,
    length,
    STOPS: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # power of two, at least `blocks`
    GIVEN: tl.constexpr,
    GOES_ON: tl.constexpr,  # another step follows: what `embed` does for it is done here
    CHANNELS: tl.constexpr,
    SMEAR: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`decode.advance`, and before it the best of each row's blocks unless GIVEN. One program a row."""
    start(PDL)
    row = tl.program_id(0)
    stop_at = tl.arange(0, BLOCK_STOPS)
    alive = tl.load(running + row).to(tl.int1)
    left = tl.load(remaining + row) - 1
    here = tl.load(position + row)
    old = tl.load(token + row)
    stop_ids = tl.load(stops + row * STOPS + stop_at, mask=stop_at < STOPS, other=-1)
    wait(PDL)
    write = tl.load(column) - behind
    if GIVEN:
        new = tl.load(given + row)
    else:
        block = tl.arange(0, BLOCKS)
        bests = tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf"))
        # Blocks stand in the order of their columns, so the first of equals is the first column again.
        new = tl.load(index + row * blocks + tl.argmax(bests, 0)).to(tl.int64)
    tl.store(drawn + row * burst + write, tl.where(alive, new, -1))
    stopped = (tl.max((stop_ids == new).to(tl.int32), 0) > 0) | (left <= 0)
    if alive:
        tl.store(token + row, new)
        tl.store(position + row, here + 1)
        tl.store(remaining + row, left)
        tl.store(running + row, ~stopped)
    if GOES_ON:
        new = tl.where(alive, new, old)
        here = tl.where(alive, here + 1, here)
        _enter(
            new, row, here, alive & ~stopped, embedding, x, squares, tokens, gate, scale, length, CHANNELS, SMEAR, WIDTH, BLOCK
        )  # fmt: skip
