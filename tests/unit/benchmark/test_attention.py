"""The attention benchmark: all of its cases compute the same, and what it counts is what a query sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmark.attention import cases, measure, pairs
from nanochat.model.gpt import GPTConfig
from nanochat.model.kernels import seen

CPU = torch.device("cpu")


@settings(max_examples=30)
@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 60)))
def test_pairs_are_those_that_the_mask_lets_through(length, window):
    positions = torch.arange(length)
    assert pairs(length, window) == int(seen(positions[:, None], positions, window).sum())


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("window", [None, 24])
def test_all_cases_are_the_same_attention(window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    queries, *others = (torch.randn(2, heads, 48, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    keys, values = (side.repeat_interleave(4 // kv_heads, dim=1) for side in others)
    positions = torch.arange(48)
    scores = (queries @ keys.mT / 4).masked_fill(~seen(positions[:, None], positions, window), float("-inf"))
    expected, compared = scores.softmax(-1) @ values, []
    for name, attend in cases(48, window, 16, CPU, compile=False).items():
        try:
            found = attend(queries, *others)
        except RuntimeError:  # not on a CPU
            continue
        assert torch.allclose(found, expected, atol=1e-5), name
        compared.append(name)
    assert {"chosen"} < set(compared) if window is None else compared == ["chosen"]


def test_rows_name_what_does_not_run_here():
    config = GPTConfig(32, 1, 32, 2, 2, logit_softcap=15.0, rope_base=10_000.0, sequence_length=64)
    rows = list(measure(config, 2, CPU, torch.float32, compile=False))
    assert [row["window"] for row in rows if row["case"] == "chosen"] == [None, 32, 16]
    for row in rows:
        assert (row["ms"] is None) == ("skipped" in row)
        if row["ms"] is not None:
            assert row["ms"] > 0
            assert row["flops_per_second"] > 0
    assert next(row for row in rows if row["case"] == "cudnn")["skipped"]
    assert [row["case"] for row in measure(config, 2, CPU, torch.float32, False, only=["math"])] == ["math"]
