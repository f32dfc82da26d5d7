"""The Triton kernels against torch in float64: on a GPU as they run there, elsewhere in Triton's interpreter.

Every output lies between regions of a known value that must still hold it afterwards.
"""

# ruff: noqa: E402, what follows needs triton

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

import triton.language as tl

from nanochat.benchmark.kv_cache import LOGIT_TOLERANCE, first_difference
from nanochat.config import ADDITIONS
from nanochat.infer import decode_kernels as kernels
from nanochat.infer import dependent_launch
from nanochat.infer import product_kernels as products
from nanochat.infer.decode import Rows, advance, decode_step
from nanochat.infer.engine import Engine
from nanochat.infer.fused_step import FusedStep, Plan, Tile
from nanochat.infer.noise_kernels import gumbel as gumbel_in_triton
from nanochat.infer.requests import Request
from nanochat.infer.sampling import Kind, RowSampling, Sampling, gumbel
from nanochat.model.attention import KVCache, rotary_table, rotate
from nanochat.model.gpt import GPT, GPTConfig

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]  # numpy has no bfloat16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
PDL = {"PDL": 1, "launch_pdl": True} if ON_GPU and torch.cuda.get_device_capability() >= (9, 0) else {"PDL": 0}
NOTHING_AHEAD = {"AHEAD": 0, "KV_HEADS": 1, "D": 16, "THREADS": 32}
CANARY = 7.0
VOCAB = 97


@triton.jit
def _count(out, n):
    for i in tl.range(0, tl.load(n)):
        tl.store(out, tl.zeros((), tl.int32) + i)


def interpreter_fails() -> str | None:
    """Why these tests cannot run. Triton's interpreter up to 3.6, for one, does not count to a loaded number with numpy 2.4."""
    if not ON_GPU and isinstance(_count, triton.JITFunction):
        return "triton was imported before this without TRITON_INTERPRET=1: run this file alone"
    try:
        _count[(1,)](torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE))
    except Exception as error:
        return f"triton's interpreter does not run here: {error}"
    return None


FAILS = interpreter_fails()
pytestmark = [pytest.mark.skipif(FAILS is not None, reason=str(FAILS)), *([pytest.mark.gpu] if ON_GPU else [])]


class Guarded:
    """A tensor with 64 canaries on either side."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        size = torch.Size(shape).numel()
        self.whole = torch.full((size + 128,), CANARY, dtype=dtype, device=DEVICE)
        self.tensor = self.whole[64 : 64 + size].view(shape)
        self.tensor.fill_(float("nan") if dtype.is_floating_point else -1)

    def intact(self) -> bool:
        return bool((self.whole[:64] == CANARY).all() and (self.whole[-64:] == CANARY).all())


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Within a tolerance relative to the whole tensor's size; NaN is never close."""
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    return bool(error < TOLERANCE[dtype])


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
            x, weight, out, index, squares, squares_out, temperature, seed, position, x, x, position, squares, index, rows, parts,
            capacity, blocks, softcap, 1, 0, 0, outer, inner, tile.m, tile.n, tile.k, 1, tile.lanes, tile.stages,
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
    out, position, running, length, rows, pieces, window, HEADS: tl.constexpr, PIECE: tl.constexpr, COUNT: tl.constexpr
):
    piece = tl.arange(0, COUNT)
    head, first, count = dependent_launch.piece_of(piece, position, running, length, rows, pieces, window, HEADS, PIECE)
    tl.store(out + piece, head.to(tl.int32))
    tl.store(out + COUNT + piece, first)
    tl.store(out + 2 * COUNT + piece, count)


@pytest.mark.parametrize(("pieces", "window"), [(5, 0), (3, 0), (5, 9), (2, 9), (1, 1)])
def test_what_is_fetched_ahead_is_the_start_of_what_attention_sees(pieces, window):
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


@pytest.mark.skipif(not PDL["PDL"], reason="needs a Hopper GPU")
def test_fetching_ahead_changes_nothing():
    model, steps = tiny(torch.float16, depth=3), []
    for plan in (SPLIT_PLAN, replace(SPLIT_PLAN, ahead_megabytes=32)):
        cache, state = (
            KVCache(model.config, 3, 160, torch.device(DEVICE), torch.float16),
            Rows.empty(3, 8, torch.device(DEVICE)),
        )
        for i, side in enumerate(cache.keys + cache.values):
            side.copy_(random(*side.shape, seed=i, dtype=torch.float16))
        state.position.copy_(torch.tensor([0, 40, 131]))
        state.remaining.fill_(20)
        state.running.fill_(True)
        step = FusedStep(model, cache, state)
        with torch.no_grad():
            step(3, 1, Kind(True, False, False), 8, plan)
        steps.append([state.drawn, *cache.tensors()])
    for found in steps[1:]:
        assert all(torch.equal(one, other) for one, other in zip(steps[0], found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 32), (4, 1, 64)])
@pytest.mark.parametrize(
    ("splits", "tile", "held", "stages", "window"),
    [(1, 32, 1, 1, 0), (1, 16, 0, 3, 17), (3, 16, 1, 2, 0), (4, 32, 2, 1, 0), (3, 16, 4, 1, 40), (2, 16, 0, 1, 1)],
)
def test_attention_reads_what_is_seen_and_stores_the_new_token(
    dtype, heads, kv_heads, head_dim, splits, tile, held, stages, window
):
    """Rows at the first, the last and other positions, in caches that are NaN where nothing is filled or the window does not
    reach; a halted row stores nothing."""
    length, places = 100, [0, 1, 15, 16, 17, 47, 96, 99, 50]
    rows = capacity = len(places)
    halted = rows - 1
    qkv = random(rows, heads + 2 * kv_heads, head_dim, seed=1, dtype=dtype)
    cos, sin = (side.to(DEVICE, dtype) for side in rotary_table(length, head_dim, 10_000.0))
    position = torch.tensor(places, device=DEVICE)
    running = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    running[halted] = False
    keys, values = (Guarded(rows, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
    all_keys, all_values = (side.tensor.transpose(1, 2) for side in (keys, values))
    for row, filled in enumerate(places):
        for side, seed in ((all_keys, 2), (all_values, 3)):
            side[row, :filled] = random(filled, kv_heads, head_dim, seed=seed + 10 * row, dtype=dtype)
            if window:
                side[row, : max(0, filled - window + 1)] = float("nan")
    before = all_keys.clone()
    out = Guarded(rows, heads, head_dim, dtype=dtype)
    parts, totals = Guarded(splits, capacity, heads, head_dim), Guarded(splits, capacity, heads)
    kernels.attend[(rows, kv_heads, splits)](
        qkv, keys.tensor, values.tensor, out.tensor if splits == 1 else parts.tensor, totals.tensor, cos, sin, position, running,
        position, qkv, length, capacity, qkv[0].numel(), False, window, heads, kv_heads, head_dim, 1 if heads == kv_heads else 16, tile, splits, HELD=held, STAGES=stages, num_warps=2, **PDL,
    )  # fmt: skip
    if splits > 1:
        kernels.merge[(rows, heads)](
            parts.tensor, totals.tensor, out.tensor, capacity, heads, head_dim, splits, num_warps=1, **PDL
        )
    assert all(guarded.intact() for guarded in (keys, values, out, parts, totals))

    turned = rotate(qkv[:, None].double(), *(side[position][:, None, None].double() for side in (cos, sin)))[:, 0]
    turned = turned * (turned.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    for row, filled in enumerate(places):
        if row == halted:
            assert torch.equal(all_keys[row].nan_to_num(), before[row].nan_to_num())
            continue
        seen = slice(max(0, filled - window + 1) if window else 0, filled + 1)
        k, v = (side[row, seen].double() for side in (all_keys, all_values))  # (T, KV, D)
        assert close(k[-1], turned[row, heads : heads + kv_heads], dtype)
        assert torch.equal(v[-1], qkv[row, heads + kv_heads :].double())
        assert all_keys[row, filled + 1 :].isnan().all()
        group = heads // kv_heads
        scores = torch.einsum("hd,thd->ht", turned[row, :heads], k.repeat_interleave(group, 1)) * head_dim**-0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), v.repeat_interleave(group, 1))
        assert close(out.tensor[row], expected, dtype)


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


def tiny(dtype: torch.dtype, kv_heads: int = 2, depth: int = 2, additions: tuple[str, ...] = ADDITIONS) -> GPT:
    """Width 64 in 4 heads of 16, random weights everywhere."""
    sizes = {"logit_softcap": 15.0, "rope_base": 10_000.0, "sequence_length": 160}
    model = GPT(GPTConfig(VOCAB, depth, 64, 4, kv_heads, **sizes, additions=additions))
    generator = torch.Generator().manual_seed(kv_heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name in ("embedding", "head") else 0.2
            parameter.copy_(torch.empty(parameter.shape).normal_(0, scale, generator=generator))
    model.compute_dtype = dtype
    return model.to(DEVICE).eval()


SPLIT_PLAN = Plan(
    Tile(16, 16, 64, stages=2),
    Tile(16, 16, 32, splits=2, stages=2),
    Tile(16, 32, 32, stages=2),
    Tile(16, 16, 64, splits=4, lanes=2),
    Tile(16, 32, 64, stages=2),
    positions=32,
    attention_warps=4,
    attention_held=2,
    attention_stages=2,
)


@pytest.mark.parametrize("kind", [Kind(True, False, False), Kind(False, False, False), Kind()])
@pytest.mark.parametrize("plan", [None, SPLIT_PLAN], ids=["few rows", "parts"])
@pytest.mark.parametrize(("splits", "additions"), [(1, ADDITIONS), (2, ADDITIONS), (2, ())])
def test_a_fused_step_is_a_step_of_the_model(kind, plan, splits, additions):
    """Same draws, same state, the same keys in the cache, greedy, drawn and filtered; several steps at once and one."""
    dtype = torch.float16 if ON_GPU else torch.float32
    model, rows = tiny(dtype, additions=additions), 3
    caches, states = [], []
    for _ in range(2):
        cache = KVCache(model.config, rows, 160, torch.device(DEVICE), dtype)
        for i, side in enumerate(cache.keys + cache.values):
            side.copy_(random(*side.shape, seed=i, dtype=dtype))
        if additions:
            cache.tokens.copy_(torch.arange(rows * 160).view(rows, 160) % VOCAB)
        state = Rows.empty(rows, 8, torch.device(DEVICE))
        state.token.copy_(torch.tensor([5, 17, 80]))
        state.position.copy_(torch.tensor([0, 40, 131]))
        state.remaining.copy_(torch.tensor([20, 2, 20]))  # one halts on the way
        state.running.fill_(True)
        settings = (
            [Sampling()] * 3
            if kind.greedy
            else [Sampling(0.8, seed=1), Sampling(), Sampling(1.2, 9 * kind.cut, seed=3)]
        )
        state.sampling.put(torch.arange(rows, device=DEVICE), RowSampling.of(settings, DEVICE))
        caches.append(cache)
        states.append(state)
    fused = FusedStep(model, caches[1], states[1])
    with torch.no_grad():
        for _ in range(4):
            decode_step(model, caches[0], states[0], kind)
        fused(rows, splits, kind, 3, plan)
        fused(rows, splits, kind, 1, plan)
    assert torch.equal(states[0].drawn, states[1].drawn)
    for name in ("token", "position", "remaining", "running", "column"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
    for row, filled in enumerate(states[0].position.tolist()):  # behind that the model writes for a row that has halted
        for one, other in zip(caches[0].tensors(), caches[1].tensors(), strict=True):
            assert close(one[row, :filled], other[row, :filled].double(), torch.bfloat16 if ON_GPU else torch.float32)


@pytest.mark.skipif(ON_GPU, reason="in float32 the engine on a GPU does not use the kernels")
def test_an_engine_of_kernels_equals_recompute_and_keeps_rows_apart(recomputed):
    model = tiny(torch.float32)
    source = torch.Generator().manual_seed(0)
    requests = [
        Request(torch.randint(0, VOCAB, (n,), generator=source).tolist(), 3, temperature=t, seed=n)
        for n, t in ((1, 0.0), (63, 0.9), (64, 0.0))
    ]
    together = [c.ids for c in Engine(model, rows=3, kernels=True).generate(requests)]
    assert together == [Engine(model, rows=1, kernels=True).generate([request])[0].ids for request in requests]
    for request, ids in zip(requests, together, strict=True):
        if not request.temperature:
            assert ids == recomputed(model, request.prompt, 3)


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_captured_kernels_equal_launched_ones_and_stay_near_a_full_pass():
    """Bit for bit, whatever the graphs replayed before; and within the stated tolerance of a pass without a cache."""
    model = tiny(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    source = torch.Generator().manual_seed(0)
    requests = [
        Request(
            torch.randint(0, VOCAB, (n,), generator=source).tolist(),
            5 + 3 * i,
            temperature=i % 3 * 0.5,
            seed=i,
            top_k=i % 2 * 9,
        )
        for i, n in enumerate((1, 30, 63, 64, 65, 100, 110, 90, 3, 3))
    ]
    launched = Engine(model, rows=4, graphs=False).generate(requests)
    engine = Engine(model, rows=4)
    assert engine.decoder.fused is not None
    for _ in range(2):
        assert engine.generate(requests) == launched
    for request, completion in zip(requests, launched, strict=True):
        if not request.temperature:
            difference = first_difference(model, [list(request.prompt)], [completion.ids])
            assert difference is None or difference["margin"] <= LOGIT_TOLERANCE[torch.bfloat16]
