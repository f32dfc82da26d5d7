"""Programmatic dependent launch (PDL, Hopper): a kernel starts while the one before it still runs, and fetches what does not
depend on that one before it waits for it. PDL = 0: nothing of it; 2: the next kernel may start only after the wait.

What will be read can be asked of the L2 cache too, while the memory idles: by the kernel itself (`fetch_tile`), or by an earlier one
(`fetch_filled`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start(PDL: tl.constexpr):
    """Let the next kernel start now; it waits itself for what it needs."""
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has ended and what it wrote is visible."""
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()


@triton.jit
def fetch_lines(at):
    """Ask the L2 cache for the line of 128 bytes at each of these pointers. Only on a GPU."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch_tile(tile, outer, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, STRIDE_BYTES: tl.constexpr):
    """Ask the L2 cache for the first min(ROWS, outer) rows of a tile, ROW_BYTES each."""
    LINES: tl.constexpr = (ROW_BYTES + 127) // 128
    line = tl.arange(0, ROWS)[:, None] * 0 + tl.arange(0, 16)[None, :]
    row = tl.minimum(tl.arange(0, ROWS), outer - 1).to(tl.int64)[:, None]
    for first in tl.static_range(0, LINES, 16):
        fetch_lines(tile.to(tl.int64) + row * STRIDE_BYTES + tl.minimum(first + line, LINES - 1) * 128)


@triton.jit
def fetch_ranges(at, size):
    """Ask the L2 cache for `size` bytes from each of these addresses, both multiples of 16; 0: for nothing. Only from Hopper on."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.ne.u32 some, $2, 0; @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fetch_filled(
    keys,  # (rows, KV, L, D) in memory, of the attention to come
    values,
    position,  # (R,) int64
    running,  # (R,) bool
    length,  # L
    rows,
    pieces,
    window,
    program,
    programs,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,  # 0: nothing is asked for
    THREADS: tl.constexpr,  # of a program: each asks for a piece or two
):
    """Ask the L2 cache for what `attend` will read: of each row's heads the first `pieces` of PIECE positions. Each program for its share."""
    if PIECE:
        SIZE: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth // 8
        for begin in tl.range(0, tl.cdiv(rows * KV_HEADS * pieces, programs), THREADS):
            piece = (begin + tl.arange(0, THREADS)) * programs + program
            head, first, count = piece_of(piece, position, running, length, rows, pieces, window, KV_HEADS, PIECE)
            at = (head.to(tl.int64) * length + first) * D
            size = count * (D * SIZE)
            fetch_ranges((keys + at).to(tl.int64), size)
            fetch_ranges((values + at).to(tl.int64), size)


@triton.jit
def piece_of(piece, position, running, length, rows, pieces, window, KV_HEADS: tl.constexpr, PIECE: tl.constexpr):
    """Of a piece the head, counted through all rows, its first position and how many it has, int32; none where there is nothing to read."""
    head = piece // pieces
    inside = head < rows * KV_HEADS
    head = tl.minimum(head, rows * KV_HEADS - 1)
    row = head // KV_HEADS
    here = tl.minimum(tl.load(position + row, mask=inside, other=0), length - 1).to(tl.int32)
    alive = tl.load(running + row, mask=inside, other=0).to(tl.int1)
    oldest = tl.where(window > 0, tl.maximum(here - (window - 1), 0), 0)
    first = oldest + piece % pieces * PIECE
    return head, first, tl.where(alive, tl.minimum(tl.maximum(here - first, 0), PIECE), 0)
