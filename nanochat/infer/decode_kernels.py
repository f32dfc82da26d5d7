"""Triton kernels of the decode step: one each before and after the layers, which have five (`product_kernels`, `attention_kernels`).

At one row a step is a chain of some sixty small kernels that depend on each other, and what counts is how long the memory idles
between two of them. So each kernel fuses all that needs no other program's result, and with PDL
(`dependent_launch`) starts while the one before still runs: what does not depend on that one, the weights and the old keys
and values, it fetches before it waits. What says which rows run and where they stand is read before waiting too: so a step's first
product lets its followers start only after its own wait, when the step before has written that.

The stream x between the layers travels with the sums of its squares, one part for each block of columns that was written:
a norm without gains is one factor a row, which the product's epilogue applies. Nothing is added atomically; what a row gets
depends on nothing but its own numbers.

Shapes: R rows, C width, L cache length.
"""

import triton
import triton.language as tl

from nanochat.infer.dependent_launch import start, wait

EPSILON = tl.constexpr(1e-6)  # of model.kernels.norm


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
