"""The decode step of kernels, and an engine with it, against the model's own operations."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

from nanochat.benchmark.kv_cache import LOGIT_TOLERANCE, first_difference
from nanochat.config import ADDITIONS
from nanochat.infer.decode import Rows, decode_step
from nanochat.infer.engine import Engine
from nanochat.infer.fused_step import FusedStep, Plan, Tile, plan_for
from nanochat.infer.requests import Request
from nanochat.infer.sampling import Kind, RowSampling, Sampling
from nanochat.model.attention import KVCache
from nanochat.model.gpt import GPT, GPTConfig
from tests.unit.infer.kernels_here import DEVICE, FAILS, ON_GPU, PDL, VOCAB, close, random, tiny

pytestmark = [pytest.mark.skipif(FAILS is not None, reason=str(FAILS)), *([pytest.mark.gpu] if ON_GPU else [])]

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
@pytest.mark.parametrize(
    "plan", [None, SPLIT_PLAN, replace(SPLIT_PLAN, attention_held=0)], ids=["few rows", "parts", "nothing held"]
)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "head_dim"), [(2, 64), (16, 64), (32, 64), (32, 128), (64, 64), (93, 64), (128, 128), (130, 64)]
)
def test_every_plan_in_use_is_a_step_of_the_model(rows, head_dim):
    """A layer with value embeddings; rows of different lengths, longer than a tile; every fourth runs, which saves time."""
    dtype, width, length = torch.float16 if ON_GPU else torch.float32, 2 * head_dim, 80
    model = GPT(GPTConfig(VOCAB, 1, width, 2, 2, 15.0, 10_000.0, length, additions=("value_embeddings",)))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=i, dtype=torch.float32) * width**-0.5
    model, caches, states = model.to(DEVICE).requires_grad_(False), [], []
    model.compute_dtype = dtype
    for _ in range(2):
        cache = KVCache(model.config, rows, length, torch.device(DEVICE), dtype)
        for i, side in enumerate(cache.keys + cache.values):
            side.copy_(random(*side.shape, seed=i, dtype=dtype))
        state = Rows.empty(rows, 8, torch.device(DEVICE))
        state.token.copy_(torch.arange(rows) % VOCAB)
        state.position.copy_(torch.arange(rows) * 7 % (length - 1))
        state.remaining.fill_(20)
        running = torch.arange(rows) % 4 == 1
        state.running.copy_(running)
        caches.append(cache)
        states.append(state)
    kind = Kind(True, False, False)
    decode_step(model, caches[0], states[0], kind)
    FusedStep(model, caches[1], states[1])(rows, 1, kind, 1, plan_for(rows, head_dim))
    assert (states[0].token == states[1].token).float().mean() > (0.95 if ON_GPU else 0.999)  # near ties in float16
    for one, other in zip(caches[0].tensors(), caches[1].tensors(), strict=True):
        assert close(one[running], other[running].double(), torch.bfloat16 if ON_GPU else torch.float32)


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


@pytest.mark.skipif(not PDL["PDL"], reason="needs a Hopper GPU")
def test_fetching_ahead_changes_nothing():
    model, steps = tiny(torch.float16, depth=3), []
    plans = [
        SPLIT_PLAN,
        *(replace(SPLIT_PLAN, ahead_megabytes=32, ahead_products=n) for n in (1, 2, 3)),
    ]
    for plan in plans:
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
