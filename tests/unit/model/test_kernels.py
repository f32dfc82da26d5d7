"""Hand-written operations against torch's own, forward and gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.model.kernels import EPSILON, causal_attention, norm, squared_relu, tanh_

shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 33))


def drawn(shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.empty(shape, dtype=torch.float64).normal_(generator=generator)).requires_grad_()


@given(shape=shapes, seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=30)
def test_norm_and_its_gradient(shape, seed, scale):
    x, other = drawn(shape, seed, scale), drawn(shape, seed, scale)
    grad = drawn(shape, seed + 1).detach()
    norm(x).backward(grad)
    F.rms_norm(other, (shape[-1],), eps=EPSILON).backward(grad)
    torch.testing.assert_close(norm(x), F.rms_norm(other, (shape[-1],), eps=EPSILON))
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-9)


@given(shape=shapes, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_squared_relu_and_its_gradient(shape, seed):
    assert torch.autograd.gradcheck(squared_relu, drawn(shape, seed))
    x = drawn(shape, seed)
    torch.testing.assert_close(squared_relu(x), F.relu(x) ** 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_over_the_square_and_its_gradient(heads, kv_heads):
    sides = [drawn((2, n, 7, 6), seed) for seed, n in enumerate((heads, kv_heads, kv_heads))]
    others = [side.detach().clone().requires_grad_() for side in sides]
    grad = drawn((2, heads, 7, 6), 9).detach()
    causal_attention(*sides).backward(grad)
    F.scaled_dot_product_attention(*others, is_causal=True, enable_gqa=True).backward(grad)
    for side, other in zip(sides, others, strict=True):
        torch.testing.assert_close(side.grad, other.grad)


def test_bfloat16_stays_bfloat16():
    x = drawn((2, 3, 8), 0).detach().bfloat16()
    assert norm(x).dtype == squared_relu(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float().square().mean(-1), torch.ones(2, 3), rtol=0.02, atol=0.02)


def test_tanh_in_place():
    x = torch.linspace(-40, 40, 1001)
    torch.testing.assert_close(tanh_(x.clone()), x.double().tanh(), rtol=0, atol=3e-7, check_dtype=False)
