"""The pass over whole prompts; its kernels in Triton's interpreter where there is no GPU, and a replay that is the work again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import ADDITIONS

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")

from nanochat.infer import decoder, fused_prefill
from nanochat.infer.engine import Engine
from nanochat.infer.fused_prefill import count_of, width_of
from tests.unit.infer.kernels_here import FAILS, ON_GPU, VOCAB, tiny
from tests.unit.infer.test_engine import Replayed


@given(st.integers(1, 4096), st.integers(0, 4096))
def test_padding_is_little_and_sizes_are_few(length, more):
    longest = length + more
    width = width_of(length, longest)
    assert length <= width <= longest
    assert width - length < max(8, length / 4)
    assert width == longest or width % 8 == 0
    assert len({width_of(n, 4096) for n in range(1, 4097)}) <= 8 + 4 * 6


@given(st.integers(1, 128), st.integers(0, 128))
def test_a_pass_is_filled_up_to_few_counts(prompts, more):
    most = prompts + more
    assert prompts <= count_of(prompts, most) <= most
    assert len({count_of(n, 128) for n in range(1, 129)}) == 5 + 7


@pytest.mark.skipif(FAILS is not None or ON_GPU, reason=str(FAILS or "float32 is for the interpreter"))
@pytest.mark.parametrize("additions", [(), ADDITIONS])
def test_prompts_of_a_pass_are_computed_as_alone(additions, monkeypatch):
    """Last logits of each and what stands in the cache, with a row of padding beside them and again in what was captured."""
    monkeypatch.setattr(fused_prefill, "captured", lambda work, pool: ((graph := Replayed(work)), graph.result))
    monkeypatch.setattr(decoder, "captured", fused_prefill.captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    model = tiny(torch.float32, additions=additions)
    engine = Engine(model, rows=5, length=48, graphs=True, kernels=True)
    for turn in range(3):  # launched, captured, replayed
        prompts = [[(7 * turn + 5 * i + j) % VOCAB for j in range(n)] for i, n in enumerate((1, 9, 20))]
        slots = [3, 0, 4]
        logits = engine.prefill(prompts, [[slot] for slot in slots])
        for prompt, slot, found in zip(prompts, slots, logits, strict=True):
            with torch.no_grad():
                assert torch.allclose(found, model(torch.tensor([prompt]))[0, -1], atol=1e-4)
            alone = Engine(model, rows=1, length=48, kernels=False)
            alone.prefill([prompt], [[0]])
            for one, other in zip(engine.cache.tensors(), alone.cache.tensors(), strict=True):
                assert torch.allclose(one[slot, : len(prompt)].double(), other[0, : len(prompt)].double(), atol=1e-4)
    assert list(engine.prefill.fused.captured) == [(4, 24)]
