"""Programmatic dependent launch (PDL, Hopper): a kernel starts while the one before it still runs, and fetches what does not
depend on that one before it waits for it. PDL = 0: nothing of it; 2: the next kernel may start only after the wait.
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
