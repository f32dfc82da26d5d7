"""The study's "token broadcasting" bug: several samples of one prompt must draw their first token independently."""

import pytest

from nanochat.benchmark.chi_squared import chi_squared
from nanochat.benchmark.first_token import (
    broadcast_first_tokens,
    distribution,
    engine_distribution,
    engine_first_tokens,
    measure,
)
from nanochat.infer.engine import Engine

PROMPT = [3, 14, 15, 92, 65]


@pytest.fixture
def mild_model(tiny_model):
    """A model whose next token is open: its head is scaled down."""
    model = tiny_model(seed=4)
    model.head.data *= 0.3
    return model


def follows_the_model(draws, probabilities) -> bool:
    """The check that both variants below are put to."""
    return chi_squared(draws, probabilities).p_value > 1e-3


def test_first_tokens_of_many_samples_follow_the_distribution(mild_model):
    model = mild_model
    expected = distribution(model, PROMPT)
    for seed in range(3):
        draws = engine_first_tokens(Engine(model, rows=64), PROMPT, 3000, seed)
        assert follows_the_model(draws, expected)
        assert draws.unique().numel() > 20


def test_the_check_fails_when_one_first_token_is_copied_to_all_rows(mild_model):
    model = mild_model
    expected = distribution(model, PROMPT)
    for seed in range(3):
        draws = broadcast_first_tokens(model, PROMPT, 3000, seed)
        assert not follows_the_model(draws, expected)
        assert draws.unique().numel() == 1


def test_the_engine_draws_from_the_plain_model_s_distribution(mild_model):
    engine = Engine(mild_model, rows=4)
    assert engine_distribution(engine, PROMPT).allclose(distribution(mild_model, PROMPT), atol=1e-6)
    before, after = measure(engine, PROMPT, 1000, seed=5)
    assert before["total_variation"] == 0
    assert after["total_variation"] < 1e-5
    assert before["p_value"] < 1e-9 < 1e-3 < after["p_value"]
