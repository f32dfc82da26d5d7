"""The Triton kernels against torch in float64: on a GPU as they run there, elsewhere in Triton's interpreter.

Every output lies between regions of a known value that must still hold it afterwards.
"""

# ruff: noqa: E402, what follows needs triton

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

import triton.language as tl

from nanochat.infer import decode_kernels as kernels
from nanochat.infer import dependent_launch
from nanochat.infer import product_kernels as products
from nanochat.infer.decode import Rows, advance
from nanochat.infer.fused_step import Tile
from nanochat.infer.noise_kernels import gumbel as gumbel_in_triton
from nanochat.infer.sampling import gumbel
from tests.unit.infer.kernels_here import DEVICE, DTYPES, FAILS, ON_GPU, PDL, TOLERANCE, Guarded, close, random

pytestmark = [pytest.mark.skipif(FAILS is not None, reason=str(FAILS)), *([pytest.mark.gpu] if ON_GPU else [])]
NOTHING_AHEAD = {"AHEAD": 0, "KV_HEADS": 1, "D": 16, "THREADS": 32}


TILES = [
    Tile(1, 8, 32, warps=2),
    Tile(4, 16, 64),
    Tile(16, 16, 32, stages=3),
    Tile(32, 16, 64, stages=2),
    Tile(16, 8, 64, warps=4, lanes=4),
    Tile(16, 16, 64, stages=2, lanes=2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rows", "outer", "inner"), [(1, 48, 64), (19, 97, 192)])
def test_products_and_their_ends(dtype, tile, rows, outer, inner):
    tile, capacity, softcap = tile.fitted(inner), rows + 2, 15.0
    x, weight = random(rows, inner, seed=1, dtype=dtype), random(outer, inner, seed=2, dtype=dtype, scale=inner**-0.5)
    parts, blocks = 3, -(-outer // tile.n)
    # Sums of squares in parts, as whoever wrote x left them.
    squares = torch.zeros(parts, capacity, device=DEVICE)
    for part, piece in enumerate(x.float().tensor_split(parts, dim=1)):
        squares[part, :rows] = piece.square().sum(1)
    temperature = torch.tensor([i % 2 * 0.7 for i in range(rows)], device=DEVICE)
    seed = torch.arange(rows, device=DEVICE) * 2**33 + 5
    position = torch.arange(rows, device=DEVICE) * 3
    wide_x, wide = x.double(), weight.double()
    product = wide_x @ wide.T
    normed = (wide_x * (wide_x.square().mean(1, keepdim=True) + 1e-6).rsqrt()) @ wide.T

    def launch(out, index, squares_out, epilogue, with_norm):
        grid = (blocks, -(-rows // tile.m), 1)
        products.matmul[grid](
            x, weight, out, index, squares, squares_out, temperature, seed, position, x, x, position, squares, index, rows,
            parts, capacity, blocks, softcap, 1, 0, 0, outer, inner, tile.m, tile.n, tile.k, 1, tile.lanes, tile.stages,
            NORMED=with_norm, PARTS=4, EPILOGUE=epilogue.value, **NOTHING_AHEAD, num_warps=tile.warps, **PDL,
        )  # fmt: skip

    for with_norm, expected in ((False, product), (True, normed)):
        out = Guarded(rows, outer, dtype=dtype)
        launch(out.tensor, squares, squares, products.STORE, with_norm)
        assert close(out.tensor, expected, dtype)
        assert out.intact()

    out = Guarded(rows, outer, dtype=dtype)
    launch(out.tensor, squares, squares, products.SQUARED_RELU, True)
    assert close(out.tensor, normed.relu().square(), dtype)

    stream, sums = Guarded(rows, outer, dtype=dtype), Guarded(blocks, capacity)
    before = random(rows, outer, seed=3, dtype=dtype)
    stream.tensor.copy_(before)
    launch(stream.tensor, squares, sums.tensor, products.ADD, False)
    assert close(stream.tensor, before.double() + product, dtype)
    assert close(sums.tensor[:, :rows].sum(0), stream.tensor.double().square().sum(1), torch.float32)
    assert stream.intact()
    assert sums.intact()

    logits = Guarded(rows, outer)
    launch(logits.tensor, squares, squares, products.LOGITS, True)
    assert close(logits.tensor, softcap * (normed / softcap).tanh(), dtype)
    assert logits.intact()

    for epilogue in (products.ARGMAX, products.DRAW):
        best, index = Guarded(rows, blocks), Guarded(rows, blocks, dtype=torch.int32)
        launch(best.tensor, index.tensor, squares, epilogue, True)
        assert best.intact()
        assert index.intact()
        chosen = index.tensor.gather(1, best.tensor.argmax(1, keepdim=True))[:, 0].long()
        values = normed if epilogue == products.ARGMAX else softcap * (normed / softcap).tanh()
        if epilogue == products.DRAW:
            noise = gumbel(seed & 0xFFFFFFFF, position + 1, outer)
            values = torch.where(
                temperature[:, None] > 0, values / temperature.clamp_min(1e-6)[:, None] + noise, values
            )
        lost = values.amax(1) - values.gather(1, chosen[:, None])[:, 0]
        assert lost.max() < 20 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("tile", [Tile(2, 8, 32), Tile(16, 16, 32, stages=2), Tile(16, 16, 64, lanes=4)], ids=str)
def test_parts_of_a_product_add_up_time_and_again(dtype, splits, tile):
    """The last program to arrive at a tile adds its parts, and leaves the counters as it found them."""
    rows, width, inner, capacity, blocks = 19, 61, 192, 21, -(-61 // tile.n)
    tile = Tile(**vars(tile) | {"splits": splits}).fitted(inner)
    assert tile.splits == splits
    x, weight = random(rows, inner, seed=1, dtype=dtype), random(width, inner, seed=2, dtype=dtype, scale=0.1)
    expected = random(rows, width, seed=3, dtype=dtype)
    stream, shares, sums = (
        Guarded(rows, width, dtype=dtype),
        Guarded(splits, capacity, width),
        Guarded(blocks, capacity),
    )
    stream.tensor.copy_(expected)
    arrived = torch.zeros(blocks, capacity, dtype=torch.int32, device=DEVICE)
    results = []
    for _ in range(2):
        stream.tensor.copy_(expected)
        products.matmul[(blocks, -(-rows // tile.m), splits)](
            x, weight, stream.tensor, arrived, sums.tensor, sums.tensor, sums.tensor, sums.tensor, sums.tensor, x, x, arrived,
            shares.tensor, arrived, rows, 0, capacity, blocks, 15.0, 1, 0, 0, width, inner, tile.m, tile.n, tile.k, splits,
            tile.lanes, tile.stages, NORMED=False, PARTS=1, EPILOGUE=products.ADD.value, **NOTHING_AHEAD, **PDL,
        )  # fmt: skip
        assert not arrived.any()
        results.append(stream.tensor.clone())
    assert torch.equal(*results)
    assert close(stream.tensor, expected.double() + x.double() @ weight.double().T, dtype)
    assert close(sums.tensor[:, :rows].sum(0), stream.tensor.double().square().sum(1), torch.float32)
    assert stream.intact()
    assert shares.intact()
    assert sums.intact()


@triton.jit
def _pieces(
    out,
    position,
    running,
    length,
    rows,
    pieces,
    window,
    HEADS: tl.constexpr,
    PIECE: tl.constexpr,
    COUNT: tl.constexpr,
):
    piece = tl.arange(0, COUNT)
    head, first, count = dependent_launch.piece_of(piece, position, running, length, rows, pieces, window, HEADS, PIECE)
    tl.store(out + piece, head.to(tl.int32))
    tl.store(out + COUNT + piece, first)
    tl.store(out + 2 * COUNT + piece, count)


@pytest.mark.parametrize(("pieces", "window"), [(5, 0), (3, 0), (5, 9), (2, 9), (1, 1)])
def test_what_is_fetched_ahead_is_what_attention_sees(pieces, window):
    """Of each head of a running row the positions that `attend` reads, up to the limit, once each; nothing else of the cache."""
    length, heads, size, count = 40, 3, 8, 128
    positions, running = [0, 1, 17, 39, 55], [True, True, True, True, False]
    found = torch.full((3, count), -1, dtype=torch.int32, device=DEVICE)
    _pieces[(1,)](
        found, torch.tensor(positions, device=DEVICE), torch.tensor(running, device=DEVICE), length, len(positions), pieces,
        window, heads, size, count,
    )  # fmt: skip
    read: dict[int, list[int]] = {head: [] for head in range(len(positions) * heads)}
    for head, first, many in found.T.tolist():
        read[head] += range(first, first + many)
    for head, positions_read in read.items():
        row = head // heads
        here = min(positions[row], length - 1)
        seen = range(max(0, here - window + 1) if window else 0, here if running[row] else 0)
        assert positions_read == list(seen)[: pieces * size]


@triton.jit
def _noise(seed, draw, out, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    row, token = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    key = tl.load(seed + row).to(tl.uint32)
    values = gumbel_in_triton(key, tl.load(draw + row).to(tl.uint32), token)
    tl.store(out + row[:, None] * TOKENS + token[None, :], values)


def test_the_noise_is_that_of_the_torch_sampler():
    seed, draw = torch.arange(8, device=DEVICE) * 0x9E3779B1, torch.arange(8, device=DEVICE) * 1000
    out = torch.zeros(8, 256, device=DEVICE)
    _noise[(1,)](seed, draw, out, 8, 256)
    assert torch.allclose(out, gumbel(seed, draw, 256), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("given", "goes_on"), [(False, False), (True, False), (False, True), (True, True)])
def test_finish_is_advance(given, goes_on):
    """Rows that stop by a token, by their length, not at all, and that had halted before. When another step follows, what `embed` does."""
    rows, blocks, behind = 6, 5, 3 if goes_on else 1
    embedding, gate, scale = random(30, 24, seed=2), random(8, seed=3), random(1, seed=4)
    smear = {"CHANNELS": 8, "SMEAR": True, "WIDTH": 24, "BLOCK": 32}
    best, index = random(rows, blocks, seed=1), torch.arange(rows * blocks, device=DEVICE).view(rows, blocks).int()
    best[2, 1] = best[2, 3] = 9.0  # of equals the first
    drawn = index.gather(1, best.argmax(1, keepdim=True))[:, 0].long()

    def state() -> Rows:
        made = Rows.empty(rows, 4, torch.device(DEVICE))
        made.running[:5] = True
        made.position.copy_(torch.arange(rows) * 10)
        made.remaining.copy_(torch.tensor([1, 5, 5, 5, 2, 3]))
        made.stops[1, 3] = drawn[1]
        made.stops[3, 8] = drawn[3]
        return made

    expected, found = state(), state()
    expected.column.fill_(2)
    advance(expected, drawn)
    found.column.fill_(2 + behind)  # `embed` has moved it
    x, squares, tokens = (
        [torch.zeros(rows, n, device=DEVICE).to(dtype) for _ in range(2)]
        for n, dtype in ((24, torch.float32), (1, torch.float32), (60, torch.int64))
    )
    kernels.finish[(rows,)](
        best, index, drawn if given else index, found.token, found.position, found.remaining, found.running, found.stops,
        found.drawn, found.column, blocks, 4, behind, embedding, x[0], squares[0], tokens[0], gate, scale, 60,
        found.stops.size(1), 16, 8, GIVEN=given, GOES_ON=goes_on, **smear, **PDL,
    )  # fmt: skip
    assert int(found.column) == 2 + behind
    found.column.fill_(3)
    if goes_on:
        kernels.embed[(rows,)](
            expected.token, expected.column.clone(), 1, embedding, x[1], squares[1], tokens[1], expected.position, expected.running,
            gate, scale, 60, **smear,
        )  # fmt: skip
    for one, other in (x, squares, tokens):
        assert torch.equal(one, other)
    for name in ("token", "position", "remaining", "running", "drawn", "column"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
