"""Triton kernels of the decode step: five a layer, and one each before and after.

At one row a step is a chain of some sixty small kernels that depend on each other, and what counts is how long the memory idles
between two of them. So each kernel fuses all that needs no other program's result, and with PDL (programmatic dependent
launch, Hopper) starts while the one before still runs: what does not depend on that one, the weights and the old keys and
values, it fetches before it waits. The first kernel of a step is launched without PDL, so that all before it has finished.

The stream x between the layers travels with the sums of its squares, one part for each block of columns that was written:
a norm without gains is one factor a row, which the product's epilogue applies. Nothing is added atomically; what a row gets
depends on nothing but its own numbers.

Shapes: R rows, C width, K a product's inner and N its outer size, H heads, KV heads of keys, D head size, L cache length.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanochat.infer.noise_kernels import gumbel

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm
LOG2_E = tl.constexpr(1.4426950408889634)

# What a product does with its result.
STORE = tl.constexpr(0)
SQUARED_RELU = tl.constexpr(1)
ADD = tl.constexpr(2)  # to the stream, in place, with the sums of squares
PART = tl.constexpr(3)  # one of several parts of the sum over K; `add_parts` joins them
ARGMAX = tl.constexpr(4)  # of each block of logits
DRAW = tl.constexpr(5)  # the same after Gumbel noise: a draw
LOGITS = tl.constexpr(6)


@triton.jit
def _start(PDL: tl.constexpr):
    """Let the next kernel start now; it waits itself for what it needs."""
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def _wait(PDL: tl.constexpr):
    """Until the kernel before has ended and what it wrote is visible."""
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def _fetch_ahead(tile, outer, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, STRIDE_BYTES: tl.constexpr):
    """Ask the L2 cache for the first min(ROWS, outer) rows of a tile, ROW_BYTES each: one request for a line of 128."""
    LINES: tl.constexpr = (ROW_BYTES + 127) // 128
    line = tl.arange(0, ROWS)[:, None] * 0 + tl.arange(0, 16)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), outer - 1).to(tl.int64)[:, None]
    for first in tl.static_range(0, LINES, 16):
        at = tile.to(tl.int64) + row * STRIDE_BYTES + tl.minimum(first + line, LINES - 1) * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["length"])
def embed(
    token,  # (R,) int64
    embedding,  # (V, C)
    x,  # (R, C)
    squares,  # (1, R) float32
    column,
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
    PDL: tl.constexpr,
):
    """x = norm(embedding[token]), smeared, and the sums of its squares. One program a row. `column` moves on by one step."""
    _start(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    new = tl.load(token + row)
    rounded = _normed(embedding + new * WIDTH + at, inside, WIDTH)
    if SMEAR:
        here = tl.minimum(tl.load(position + row), length - 1)
        place = tokens + row.to(tl.int64) * length + here
        before = _normed(embedding + tl.load(place - 1, mask=here > 0, other=0) * WIDTH + at, inside, WIDTH)
        weights = tl.load(gate + at, mask=at < CHANNELS, other=0.0).to(tl.float32)
        share = tl.load(scale).to(tl.float32) * tl.sigmoid(tl.sum(weights * rounded.to(tl.float32), 0))
        smeared = rounded.to(tl.float32) + tl.where(here > 0, share, 0.0) * before.to(tl.float32)
        rounded = smeared.to(x.dtype.element_ty)
        if tl.load(running + row).to(tl.int1):
            tl.store(place, new)
    tl.store(x + row * WIDTH + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    tl.store(squares + row, tl.sum(wide * wide, 0))
    if row == 0:
        tl.store(column, tl.load(column) + 1)


@triton.jit
def _normed(source, inside, WIDTH: tl.constexpr):
    """norm of the row that stands there."""
    values = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    return (values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPSILON)).to(source.dtype.element_ty)


@triton.jit(do_not_specialize=["rows", "parts", "capacity", "blocks", "softcap"])
def matmul(
    x,  # (R, K)
    weight,  # (N, K)
    out,  # (R, N); PART: (SPLITS, capacity, N) float32; ARGMAX and DRAW: (R, blocks) float32, each block's best
    index,  # ARGMAX and DRAW: (R, blocks) int32, its column
    squares,  # (parts, capacity) float32: NORMED reads it; ADD writes it to squares_out
    squares_out,
    temperature,  # (R,) float32 ]
    seed,  # (R,) int64          ] for DRAW
    position,  # (R,) int64      ]
    rows,
    parts,
    capacity,  # rows that the buffers hold
    blocks,  # of columns
    softcap,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight to the tensor cores; 0: for few rows, weights fetched into registers before the wait
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,  # power of two, at least `parts`
    EPILOGUE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x @ weight.T with what comes before and after it. Grid (blocks of N, blocks of R, SPLITS)."""
    _start(PDL)
    block, split = tl.program_id(0), tl.program_id(2)
    first_row = tl.program_id(1) * BLOCK_M
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < N)[:, None]
    inner = split * (K // SPLITS) + tl.arange(0, BLOCK_K)
    w_at = weight + column.to(tl.int64)[:, None] * K + inner[None, :]
    STEPS: tl.constexpr = K // SPLITS // BLOCK_K
    if STAGES == 0:
        held = ()
        for step in tl.static_range(STEPS):
            held = held + (tl.load(w_at + step * BLOCK_K, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005
        _wait(PDL)
        for m in tl.static_range(BLOCK_M):
            if first_row + m < rows:
                # Each thread loads what it multiplies: a tile of x like that of the weights, so that none is passed around.
                x_at = x + (first_row + m) * K + inner[None, :] + tl.zeros((BLOCK_N, 1), tl.int32)
                products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                for step in tl.static_range(STEPS):
                    products += tl.load(x_at + step * BLOCK_K).to(tl.float32) * held[step]
                row = first_row + m + tl.arange(0, 1)
                _end(
                    tl.sum(products, 1)[None, :], row, row < rows, column, block, split, out, index, squares, squares_out,
                    temperature, seed, position, parts, capacity, blocks, softcap, N, K, BLOCK_N, NORMED, PARTS, EPILOGUE,
                )  # fmt: skip
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        there = row < rows
        x_at = x + row[:, None] * K + inner[None, :]
        if PDL:
            SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
            start = weight + block.to(tl.int64) * BLOCK_N * K + split * (K // SPLITS)
            _fetch_ahead(start, N - block * BLOCK_N, BLOCK_N, K // SPLITS * SIZE, K * SIZE)
        _wait(PDL)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            some = tl.load(x_at + step * BLOCK_K, mask=there[:, None], other=0.0)
            tile = tl.load(w_at + step * BLOCK_K, mask=inside, other=0.0)
            total = tl.dot(some, tile.T, total)
        _end(
            total, row, there, column, block, split, out, index, squares, squares_out,
            temperature, seed, position, parts, capacity, blocks, softcap, N, K, BLOCK_N, NORMED, PARTS, EPILOGUE,
        )  # fmt: skip


@triton.jit
def _end(
    total,  # (rows of the tile, BLOCK_N) float32
    row,
    there,
    column,
    block,
    split,
    out,
    index,
    squares,
    squares_out,
    temperature,
    seed,
    position,
    parts,
    capacity,
    blocks,
    softcap,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Scale and store one tile of a product."""
    inside = column < N
    if NORMED:
        part = tl.arange(0, PARTS)
        here = (part < parts)[:, None] & there[None, :]
        sums = tl.load(squares + part[:, None] * capacity + row[None, :], mask=here, other=0.0)
        total *= tl.rsqrt(tl.sum(sums, 0) / K + EPSILON)[:, None]
    place = row[:, None] * N + column[None, :]
    both = there[:, None] & inside[None, :]
    if EPILOGUE == STORE:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=both)
    elif EPILOGUE == SQUARED_RELU:
        positive = tl.maximum(total, 0.0)
        tl.store(out + place, (positive * positive).to(out.dtype.element_ty), mask=both)
    elif EPILOGUE == ADD:
        stream = (tl.load(out + place, mask=both, other=0.0).to(tl.float32) + total).to(out.dtype.element_ty)
        tl.store(out + place, stream, mask=both)
        wide = stream.to(tl.float32)
        tl.store(squares_out + block * capacity + row, tl.sum(wide * wide, 1), mask=there)
    elif EPILOGUE == PART:
        tl.store(out + split * capacity * N + place, total, mask=both)
    elif EPILOGUE == ARGMAX:
        _store_best(tl.where(inside[None, :], total, float("-inf")), out, index, row, there, block, blocks, BLOCK_N)
    else:
        logits = softcap * (2 * tl.sigmoid(2 * total / softcap) - 1)
        if EPILOGUE == LOGITS:
            tl.store(out + row.to(tl.int64)[:, None] * N + column[None, :], logits, mask=both)
        else:
            heat = tl.load(temperature + row, mask=there, other=0.0)[:, None]
            key = tl.load(seed + row, mask=there, other=0).to(tl.uint32)
            draws = (tl.load(position + row, mask=there, other=0) + 1).to(tl.uint32)
            noisy = logits / tl.maximum(heat, 1e-6) + gumbel(key, draws, column)
            noisy = tl.where(heat > 0, noisy, logits)
            _store_best(tl.where(inside[None, :], noisy, float("-inf")), out, index, row, there, block, blocks, BLOCK_N)


@triton.jit
def _store_best(values, out, index, row, there, block, blocks, BLOCK_N: tl.constexpr):
    """The largest of each row of (BLOCK_M, BLOCK_N) and its column, the first of equals."""
    tl.store(out + row * blocks + block, tl.max(values, 1), mask=there)
    tl.store(index + row * blocks + block, block * BLOCK_N + tl.argmax(values, 1), mask=there)


@triton.jit(do_not_specialize=["capacity"])
def add_parts(
    x,
    parts,
    squares,
    capacity,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x (R, C) += the sum of parts (SPLITS, capacity, C) in their order; squares (1, R). One program a row."""
    _start(PDL)
    row, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < WIDTH
    _wait(PDL)
    total = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * capacity + row) * WIDTH + at, mask=inside, other=0.0)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row * WIDTH + at, rounded, mask=inside)
    wide = rounded.to(tl.float32)
    tl.store(squares + row, tl.sum(wide * wide, 0))


@triton.jit(do_not_specialize=["length", "capacity"])
def attend(
    qkv,  # (R, STRIDE): H + 2 KV heads of D; GATED: then KV gates
    keys,  # (rows, L, KV, D), one row's memory in one piece
    values,
    out,  # (R, H, D); SPLITS > 1: (SPLITS, capacity, H, D) float32, not normalised
    stats,  # SPLITS > 1: (SPLITS, capacity, H, 2) float32, largest score (base 2) and sum
    cos,  # (positions, D / 2)
    sin,
    position,  # (R,) int64, of the new token
    running,  # (R,) bool
    token,  # (R,) int64, the new token     ]
    embedding,  # (V, KV, D), of values     ] for GATED
    length,  # L
    capacity,
    STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,  # queries of one head of keys, padded to a tensor core's tile
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,  # fetch the first tile before the wait
    PDL: tl.constexpr,
):
    """Turn, norm and store the new key, store the new value (GATED: with its embedding), attend to the filled part of the row. Grid (R, KV, SPLITS).

    The filled positions are divided among the splits in whole tiles; the new token belongs to the first split. A row that
    has halted reads and stores nothing.
    """
    _start(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    d, query, t = tl.arange(0, D), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_T)
    alive = tl.load(running + row).to(tl.int1)
    here = tl.minimum(tl.load(position + row), length - 1).to(tl.int32)
    filled = tl.where(alive, here, 0)
    chunk = tl.cdiv(tl.cdiv(filled, SPLITS), BLOCK_T) * BLOCK_T
    first = split * chunk
    last = tl.minimum(first + chunk, filled)
    side = (row.to(tl.int64) * length * KV_HEADS + head) * D
    keys += side
    values += side
    at = t[:, None] * (KV_HEADS * D) + d[None, :]
    if EARLY:
        seen = first + t < last
        k = tl.load(keys + first * (KV_HEADS * D) + at, mask=seen[:, None], other=0.0)
        v = tl.load(values + first * (KV_HEADS * D) + at, mask=seen[:, None], other=0.0)
    turn_cos = tl.load(cos + here * (D // 2) + d % (D // 2)).to(tl.float32)
    turn_sin = tl.load(sin + here * (D // 2) + d % (D // 2)).to(tl.float32)
    turn_sin = tl.where(d < D // 2, turn_sin, -turn_sin)
    other = (d + D // 2) % D
    if GATED:
        added = tl.load(embedding + (tl.load(token + row) * KV_HEADS + head) * D + d)
    _wait(PDL)
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
    owner = split == 0
    if owner & alive:
        tl.store(keys + here * (KV_HEADS * D) + d, new_k)
        tl.store(values + here * (KV_HEADS * D) + d, new_v)
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * SCALE  # (BLOCK_G,)
    largest = tl.where(owner, score, float("-inf"))
    total = tl.where(owner, 1.0, 0.0) + tl.zeros((BLOCK_G,), tl.float32)
    mixed = tl.where(owner, new_v.to(tl.float32)[None, :], 0.0) + tl.zeros((BLOCK_G, D), tl.float32)
    if EARLY:
        if last > first:
            largest, total, mixed = _attend_tile(q, k, v, seen, largest, total, mixed, SCALE)
        first += BLOCK_T
    for start in tl.range(first, last, BLOCK_T):
        seen = start + t < last
        k = tl.load(keys + start * (KV_HEADS * D) + at, mask=seen[:, None], other=0.0)
        v = tl.load(values + start * (KV_HEADS * D) + at, mask=seen[:, None], other=0.0)
        largest, total, mixed = _attend_tile(q, k, v, seen, largest, total, mixed, SCALE)
    heads = head * GROUP + query
    if SPLITS == 1:
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (row * HEADS + heads)[:, None] * D + d[None, :], result, mask=real)
    else:
        place = (split * capacity + row) * HEADS + heads
        tl.store(out + place[:, None] * D + d[None, :], mixed, mask=real)
        tl.store(stats + place * 2, largest, mask=query < GROUP)
        tl.store(stats + place * 2 + 1, total, mask=query < GROUP)


@triton.jit
def _attend_tile(q, k, v, seen, largest, total, mixed, SCALE: tl.constexpr):
    """One tile of keys and values joins the running softmax (Milakov & Gimelshein 2018), in powers of two."""
    scores = tl.where(seen[None, :], tl.dot(q, k.T) * SCALE, float("-inf"))  # (BLOCK_G, BLOCK_T)
    now = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2(largest - now)
    p = tl.exp2(scores - now[:, None])
    return now, total * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, mixed * shrink[:, None])


@triton.jit(do_not_specialize=["capacity"])
def merge(parts, stats, out, capacity, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """Join the splits of `attend` in their order: out (R, H, D). Grid (R, H)."""
    _start(PDL)
    row, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, D)
    _wait(PDL)
    largest = tl.load(stats + (row * HEADS + head) * 2)
    for split in tl.static_range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(stats + ((split * capacity + row) * HEADS + head) * 2))
    total, mixed = 0.0, tl.zeros((D,), tl.float32)
    for split in tl.static_range(SPLITS):
        place = (split * capacity + row) * HEADS + head
        share = tl.exp2(tl.load(stats + place * 2) - largest)
        total += share * tl.load(stats + place * 2 + 1)
        mixed += share * tl.load(parts + place * D + d)
    tl.store(out + (row * HEADS + head) * D + d, (mixed / total).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["blocks", "burst"])
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
    column,  # (1,) int64, one behind where to write: `embed` has moved it
    blocks,
    burst,  # columns of drawn
    STOPS: tl.constexpr,
    BLOCK_STOPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # power of two, at least `blocks`
    GIVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """`decode.advance`, and before it the best of each row's blocks unless GIVEN. One program a row."""
    _start(PDL)
    row = tl.program_id(0)
    stop_at = tl.arange(0, BLOCK_STOPS)
    alive = tl.load(running + row).to(tl.int1)
    left = tl.load(remaining + row) - 1
    stop_ids = tl.load(stops + row * STOPS + stop_at, mask=stop_at < STOPS, other=-1)
    _wait(PDL)
    write = tl.load(column) - 1
    if GIVEN:
        new = tl.load(given + row)
    else:
        block = tl.arange(0, BLOCKS)
        bests = tl.load(best + row * blocks + block, mask=block < blocks, other=float("-inf"))
        # Blocks stand in the order of their columns, so the first of equals is the first column again.
        new = tl.load(index + row * blocks + tl.argmax(bests, 0)).to(tl.int64)
    tl.store(drawn + row * burst + write, tl.where(alive, new, -1))
    if alive:
        stopped = (tl.max((stop_ids == new).to(tl.int32), 0) > 0) | (left <= 0)
        tl.store(token + row, new)
        tl.store(position + row, tl.load(position + row) + 1)
        tl.store(remaining + row, left)
        tl.store(running + row, ~stopped)
