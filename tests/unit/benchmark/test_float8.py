"""The float8 benchmark: what it multiplies is what bfloat16 multiplies, up to float8's rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmark.float8 import FORWARD, GRADIENT, MEASURED, forward_and_gradients, measure, products, to_float8
from nanochat.model.gpt import GPTConfig

CPU = torch.device("cpu")
CONFIG = GPTConfig(64, 2, 32, 2, 2, logit_softcap=15.0, rope_base=10_000.0, sequence_length=48)


def no_products() -> bool:
    one, scale = torch.ones(16, 16).to(FORWARD), torch.ones(())
    try:
        torch._scaled_mm(one, one.t(), scale, scale, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return True
    return False


@settings(max_examples=30)
@given(
    st.integers(1, 20), st.integers(1, 20), st.sampled_from([FORWARD, GRADIENT]), st.floats(-20, 20), st.integers(0, 99)
)
def test_a_tensor_comes_back_within_the_rounding(rows, columns, dtype, magnitude, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**magnitude
    small, transposed, scale = to_float8(x, dtype)
    assert small.is_contiguous()
    assert transposed.is_contiguous()
    assert torch.equal(small.float().T, transposed.float())
    back, step = small.float() * scale, torch.finfo(dtype).eps
    # Half a step of what a number is, or of the smallest normal one.
    allowed = (x.abs().clamp_min(torch.finfo(dtype).tiny * scale) * step / 2) * 1.001
    assert ((back - x).abs() <= allowed).all()


def test_products_are_those_of_the_exact_ones():
    if no_products():
        pytest.skip("this torch has no float8 products on a CPU")
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((48, 32), (64, 32), (48, 64)))
    found = forward_and_gradients(to_float8(x, FORWARD), to_float8(weight, FORWARD), to_float8(grad, GRADIENT))
    for one, exact in zip(found, (x @ weight.T, grad @ weight, grad.T @ x), strict=True):
        assert one.shape == exact.shape
        assert (one.float() - exact).norm() < 0.1 * exact.norm()


def test_rows_are_of_all_products_or_say_why_not():
    rows = {row["case"]: row for row in measure(CONFIG, 1, CPU)}
    assert products(CONFIG)["head"] == (64, 32)
    assert set(products(CONFIG)) <= set(rows)
    for row in rows.values():
        assert set(MEASURED) <= set(row)
    assert ("all" in rows) != no_products()
    if "all" in rows:
        of_a_block = [rows[name]["bfloat16_ms"] for name in ("qkv", "out", "up", "down")]
        assert rows["all"]["bfloat16_ms"] == pytest.approx(2 * sum(of_a_block) + rows["head"]["bfloat16_ms"])
    else:
        assert all(row["skipped"] for row in rows.values())
    assert [row["case"] for row in measure(CONFIG, 1, CPU, ["up"])] == ["up"]
