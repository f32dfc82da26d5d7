"""Triton kernel of a decode step's products: x @ weight.T with the norm before it and what happens to its result.

With few rows a product is bound by how long one program waits: for the kernel before it, for the first bytes, for a chain of tensor
core instructions that each need the one before. So weights are fetched before the wait, K can be divided among a program's
warps (LANES), and among programs (SPLITS), of which the last to arrive at a tile adds all parts in their order: nothing is added
atomically, what a row gets depends on its own numbers alone.
"""

import triton
import triton.language as tl

from nanochat.infer.dependent_launch import fetch_filled, fetch_tile, start, wait
from nanochat.infer.noise_kernels import gumbel

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm

# What a product does with its result.
STORE = tl.constexpr(0)
SQUARED_RELU = tl.constexpr(1)
ADD = tl.constexpr(2)  # to the stream, in place, with the sums of squares
ARGMAX = tl.constexpr(3)  # of each block of logits
DRAW = tl.constexpr(4)  # the same after Gumbel noise: a draw
LOGITS = tl.constexpr(5)


UNSPECIALIZED = ["rows", "parts", "capacity", "blocks", "softcap", "length", "pieces", "window"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def matmul(
    x,  # (R, K)
    weight,  # (N, K)
    out,  # (R, N); ARGMAX and DRAW: (R, blocks) float32, each block's best
    index,  # ARGMAX and DRAW: (R, blocks) int32, its column
    squares,  # (parts, capacity) float32: NORMED reads it; ADD writes it to squares_out
    squares_out,
    temperature,  # (R,) float32 ]
    seed,  # (R,) int64          ] for DRAW
    position,  # (R,) int64      ]
    ahead_keys,  # what the attention to come will read, for AHEAD
    ahead_values,
    running,  # (R,) bool
    shares,  # (SPLITS, capacity, N) float32       ]
    arrived,  # (blocks, capacity) int32, zeros    ] for ADD with SPLITS > 1
    rows,
    parts,
    capacity,  # rows that the buffers hold
    blocks,  # of columns
    softcap,
    length,  # L of the keys and values      ]
    pieces,  # of each row                   ] for AHEAD
    window,  # of that attention; 0: none    ]
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # under 16: no tensor cores; STAGES must be 0
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,  # parts of a tile's K that tensor cores work on side by side
    STAGES: tl.constexpr,  # tiles in flight to the tensor cores; 0: weights are fetched into registers before the wait
    NORMED: tl.constexpr,
    PARTS: tl.constexpr,  # power of two, at least `parts`
    EPILOGUE: tl.constexpr,
    AHEAD: tl.constexpr,  # positions of a piece; 0: nothing is fetched for the attention to come
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x @ weight.T with what comes before and after it. Grid (blocks of N, blocks of R, SPLITS)."""
    start(PDL)
    block, split = tl.program_id(0), tl.program_id(2)
    first_row = tl.program_id(1) * BLOCK_M
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    base = split * (K // SPLITS)
    STEPS: tl.constexpr = K // SPLITS // BLOCK_K
    program = (split * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + block
    programs = tl.num_programs(0) * tl.num_programs(1) * SPLITS
    if BLOCK_M < 16:
        inner = base + tl.arange(0, BLOCK_K)[None, :]
        w_at = weight + column.to(tl.int64)[:, None] * K + inner
        held = ()
        for step in tl.static_range(STEPS):
            held = held + (tl.load(w_at + step * BLOCK_K, mask=inside[:, None], other=0.0).to(tl.float32),)  # noqa: RUF005
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        there = row < rows
        k = base + tl.arange(0, BLOCK_K // LANES)
        if LANES == 1:
            x_at, x_there = x + row[:, None] * K + k[None, :], there[:, None]
            w_at, w_there = weight + column.to(tl.int64)[:, None] * K + k[None, :], inside[:, None]
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        else:
            k = tl.arange(0, LANES)[:, None, None] * (BLOCK_K // LANES) + k[None, None, :]
            x_at, x_there = x + row[None, :, None] * K + k, there[None, :, None]
            w_at, w_there = weight + column.to(tl.int64)[None, :, None] * K + k, inside[None, :, None]
            total = tl.zeros((LANES, BLOCK_M, BLOCK_N), tl.float32)
        held = ()
        if STAGES == 0:
            for step in tl.static_range(STEPS):
                held = held + (tl.load(w_at + step * BLOCK_K, mask=w_there, other=0.0),)  # noqa: RUF005
        elif PDL:
            SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
            tile_at = weight + block.to(tl.int64) * BLOCK_N * K + base
            fetch_tile(tile_at, N - block * BLOCK_N, BLOCK_N, K // SPLITS * SIZE, K * SIZE)
    fetch_filled(
        ahead_keys, ahead_values, position, running, length, rows, pieces, window, program, programs, KV_HEADS, D,
        AHEAD, THREADS,
    )  # fmt: skip
    wait(PDL)
    if BLOCK_M < 16:
        for m in tl.static_range(BLOCK_M):
            if first_row + m < rows:
                row = first_row + m + tl.arange(0, 1)
                there = row < rows
                sums = _sums(squares, row, there, parts, capacity, NORMED, PARTS)
                before = _before(out, row, column, there, inside, N, EPILOGUE)
                # Each thread loads what it multiplies: a tile of x like that of the weights, so that none is passed around.
                x_at = x + (first_row + m) * K + inner + tl.zeros((BLOCK_N, 1), tl.int32)
                products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
                for step in tl.static_range(STEPS):
                    products += tl.load(x_at + step * BLOCK_K).to(tl.float32) * held[step]
                _end(
                    tl.sum(products, 1)[None, :], sums, before, row, there, first_row + m, column, inside, block, split, out, index,
                    squares_out, temperature, seed, position, shares, arrived, capacity, blocks, softcap, N, K, BLOCK_N, SPLITS,
                    NORMED, EPILOGUE,
                )  # fmt: skip
    else:
        sums = _sums(squares, row, there, parts, capacity, NORMED, PARTS)
        before = _before(out, row, column, there, inside, N, EPILOGUE)
        if STAGES == 0:
            for step in tl.static_range(STEPS):
                some = tl.load(x_at + step * BLOCK_K, mask=x_there, other=0.0)
                total = _multiplied(some, held[step], total, LANES)
        else:
            for step in tl.range(0, STEPS, num_stages=STAGES):
                some = tl.load(x_at + step * BLOCK_K, mask=x_there, other=0.0)
                tile = tl.load(w_at + step * BLOCK_K, mask=w_there, other=0.0)
                total = _multiplied(some, tile, total, LANES)
        if LANES > 1:
            total = tl.sum(total, 0)
        _end(
            total, sums, before, row, there, first_row, column, inside, block, split, out, index, squares_out, temperature, seed,
            position, shares, arrived, capacity, blocks, softcap, N, K, BLOCK_N, SPLITS, NORMED, EPILOGUE,
        )  # fmt: skip


@triton.jit
def _multiplied(some, tile, total, LANES: tl.constexpr):
    """total + some @ tile.T, in each lane."""
    if LANES == 1:
        return tl.dot(some, tile.T, total)
    else:
        return tl.dot(some, tl.trans(tile, (0, 2, 1)), total)


# What the end needs is asked for before the product, so that it has come when the product is done.
@triton.jit
def _sums(squares, row, there, parts, capacity, NORMED: tl.constexpr, PARTS: tl.constexpr):
    """(PARTS, rows) of the sums of squares."""
    if NORMED:
        part = tl.arange(0, PARTS)
        here = (part < parts)[:, None] & there[None, :]
        return tl.load(squares + part[:, None] * capacity + row[None, :], mask=here, other=0.0)
    else:
        return 0.0


@triton.jit
def _before(out, row, column, there, inside, N, EPILOGUE: tl.constexpr):
    """The stream that ADD adds to."""
    if EPILOGUE == ADD:
        both = there[:, None] & inside[None, :]
        return tl.load(out + row[:, None] * N + column[None, :], mask=both, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _end(
    total,  # (rows of the tile, BLOCK_N) float32
    sums,
    before,
    row,
    there,
    first_row,
    column,
    inside,
    block,
    split,
    out,
    index,
    squares_out,
    temperature,
    seed,
    position,
    shares,
    arrived,
    capacity,
    blocks,
    softcap,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    NORMED: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Scale and store one tile of a product."""
    if NORMED:
        total *= tl.rsqrt(tl.sum(sums, 0) / K + EPSILON)[:, None]
    place = row[:, None] * N + column[None, :]
    both = there[:, None] & inside[None, :]
    if EPILOGUE == STORE:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=both)
    elif EPILOGUE == SQUARED_RELU:
        positive = tl.maximum(total, 0.0)
        tl.store(out + place, (positive * positive).to(out.dtype.element_ty), mask=both)
    elif EPILOGUE == ADD:
        if SPLITS == 1:
            _add(total, before, place, both, row, there, block, out, squares_out, capacity)
        else:
            tl.store(shares + split * capacity * N + place, total, mask=both)
            tl.debug_barrier()  # all of the tile is written before it is said to be
            counter = arrived + block * capacity + first_row
            if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
                whole = tl.zeros_like(total)
                for part in tl.static_range(SPLITS):
                    whole += tl.load(shares + part * capacity * N + place, mask=both, other=0.0, cache_modifier=".cg")
                _add(whole, before, place, both, row, there, block, out, squares_out, capacity)
                tl.store(counter, 0)
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
def _add(total, before, place, both, row, there, block, out, squares_out, capacity):
    """The stream becomes before + total; one part of its sums of squares."""
    stream = (before + total).to(out.dtype.element_ty)
    tl.store(out + place, stream, mask=both)
    wide = stream.to(tl.float32)
    tl.store(squares_out + block * capacity + row, tl.sum(wide * wide, 1), mask=there)


@triton.jit
def _store_best(values, out, index, row, there, block, blocks, BLOCK_N: tl.constexpr):
    """The largest of each row of (BLOCK_M, BLOCK_N) and its column, the first of equals."""
    tl.store(out + row * blocks + block, tl.max(values, 1), mask=there)
    tl.store(index + row * blocks + block, block * BLOCK_N + tl.argmax(values, 1), mask=there)
