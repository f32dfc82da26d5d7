"""The engine as it runs on a GPU: captured steps. The same properties as in test_engine.py."""

import random

import pytest
import torch

from nanochat.benchmark.kv_cache import LOGIT_TOLERANCE, first_difference
from nanochat.infer.capacity import rows_that_fit
from nanochat.infer.engine import Engine
from nanochat.infer.requests import Request
from nanochat.infer.sampling import Kind, RowSampling, sample
from nanochat.model.gpt import GPT, GPTConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(model, dtype: torch.dtype = torch.float32):
    """The model in that dtype; TF32 is off by default, so float32 products are exact to rounding."""
    model.compute_dtype = dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to("cuda", dtype)
    return model.to("cuda")


def requests(count: int = 12) -> list[Request]:
    """Lengths around the edges of the buckets, greedy and sampled, some with a stop token."""
    source = random.Random(1)
    return [
        Request(
            source.choices(range(97), k=(1, 30, 60, 63, 64, 65, 100, 127)[i % 8]),
            5 + 2 * i,
            temperature=0.0 if i % 2 else 0.8,
            top_k=i % 3 * 8,
            seed=i,
            stop_ids=[3] if i % 4 == 0 else [],
        )
        for i in range(count)
    ]


def test_captured_steps_equal_eager_ones(tiny_model):
    model = on_gpu(tiny_model())
    eager = Engine(model, rows=5, graphs=False).generate(requests())
    captured = Engine(model, rows=5, graphs=True)
    assert captured.generate(requests()) == eager
    # Once more, backwards: captured graphs are replayed with other rows beside each other.
    backwards = captured.generate(requests()[::-1])[::-1]
    assert [completion.ids for completion in backwards] == [completion.ids for completion in eager]


def test_captured_greedy_decode_equals_recompute(tiny_model, recomputed):
    model = on_gpu(tiny_model())
    greedy = [Request(request.prompt, request.max_new_tokens) for request in requests()]
    expected = [recomputed(tiny_model(), request.prompt, request.max_new_tokens) for request in greedy]
    for rows in (1, 3, 12):
        assert [c.ids for c in Engine(model, rows=rows).generate(greedy)] == expected


def test_bfloat16_stays_within_the_stated_tolerance(tiny_model):
    model = on_gpu(tiny_model(), torch.bfloat16)
    greedy = [Request(request.prompt, 40) for request in requests()[:8] if len(request.prompt) < 110]
    completions = Engine(model, rows=8).generate(greedy)
    for request, completion in zip(greedy, completions, strict=True):
        difference = first_difference(model, [list(request.prompt)], [completion.ids])
        assert difference is None or difference["margin"] <= LOGIT_TOLERANCE[torch.bfloat16]


def test_noise_is_the_same_on_both_devices():
    """A seed reproduces wherever it runs."""
    from nanochat.infer.sampling import gumbel

    seeds, draws = torch.arange(64), torch.arange(64) * 7
    there = gumbel(seeds.cuda(), draws.cuda(), 5000).cpu()
    assert torch.allclose(there, gumbel(seeds, draws, 5000), atol=1e-5, rtol=1e-5)


def test_first_tokens_of_many_samples_are_what_a_cpu_draws_from_the_logits(tiny_model):
    """All 4,096, in rounds of 256 rows: none is another's, none is lost. Near ties may fall either way."""
    engine = Engine(on_gpu(tiny_model(), torch.bfloat16), rows=256, length=64)
    for seed in (0, 1337):
        request = Request([3, 14, 15, 92], 1, temperature=1.0, seed=seed, samples=4096)
        drawn = torch.tensor([completion.ids[0] for completion in engine.generate([request])])
        logits = engine.prefill([request.prompt], [[0]]).cpu().expand(request.samples, -1)
        rows = RowSampling.of([request.sampling(n) for n in range(request.samples)], "cpu")
        position = torch.full((request.samples,), len(request.prompt))
        assert (drawn == sample(logits, rows, position, Kind(False, False, False))).float().mean() > 0.998


def test_memory_stays_flat_over_many_requests(tiny_model):
    engine = Engine(on_gpu(tiny_model()), rows=32)
    engine.generate(requests(64))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        engine.generate(requests(64))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_as_many_rows_fit_as_arithmetic_says():
    """Within 2% of the memory it was told, with every row in use and the costliest way to draw."""
    length, memory = 2048, 8 * 2**30
    model = on_gpu(GPT(GPTConfig(32_768, 4, 512, 8, 8, 15.0, 10_000.0, length)), torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    rows = rows_that_fit(model.config, length, 2, memory)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    source = random.Random(1)
    some = [
        Request(source.choices(range(32_768), k=length - 20), 12, temperature=0.8, top_k=50, top_p=0.9, seed=i)
        for i in range(8)
    ]
    some += [Request(source.choices(range(32_768), k=200), 12, temperature=0.8, top_k=50, seed=i) for i in range(rows)]
    engine = Engine(model, rows=rows, length=length)
    assert all(completion.error is None for completion in engine.generate(some))
    assert (torch.cuda.max_memory_allocated() - before) / memory == pytest.approx(1, abs=0.02)
