import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.benchmark.chi_squared import chi_squared


def test_known_value():
    """Mendel's peas, 315 : 108 : 101 : 32 against 9 : 3 : 3 : 1: chi2 = 0.470, p = 0.925 (three degrees)."""
    draws = torch.tensor([0] * 315 + [1] * 108 + [2] * 101 + [3] * 32)
    test = chi_squared(draws, torch.tensor([9.0, 3, 3, 1]) / 16)
    assert test.degrees == 3
    assert test.chi2 == pytest.approx(0.470, abs=1e-3)
    assert test.p_value == pytest.approx(0.925, abs=1e-3)


def test_p_values_of_a_right_distribution_are_uniform():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, generator=generator).pow(6)
    probabilities /= probabilities.sum()
    p = torch.tensor(
        [
            chi_squared(torch.multinomial(probabilities, 2000, True, generator=generator), probabilities).p_value
            for _ in range(200)
        ]
    )
    assert 0.4 < p.mean() < 0.6
    assert (p < 0.01).sum() <= 8


def test_one_token_for_all_is_rejected():
    probabilities = torch.full((50,), 0.02)
    assert chi_squared(torch.full((1000,), 7), probabilities).p_value < 1e-100


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 10))
def test_is_defined_for_any_sizes(vocab, draws, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(vocab, generator=generator).softmax(-1)
    test = chi_squared(torch.multinomial(probabilities, draws, True, generator=generator), probabilities)
    assert 0 <= test.p_value <= 1
    assert test.degrees < vocab or vocab == 1
