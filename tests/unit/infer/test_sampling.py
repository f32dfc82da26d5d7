import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.benchmark.chi_squared import chi_squared
from nanochat.infer import sampling
from nanochat.infer.sampling import Kind, RowSampling, Sampling, gumbel, sample


def draw(logits: torch.Tensor, settings: Sampling, draws: int) -> torch.Tensor:
    """Many draws from logits (V,): one row each, with consecutive seeds."""
    rows = [
        Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p, seed=i) for i in range(draws)
    ]
    return sample(logits.expand(draws, -1).clone(), RowSampling.of(rows, "cpu"), torch.zeros(draws, dtype=torch.int64))


def test_draws_over_seeds_follow_the_distribution():
    logits = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 2
    for temperature in (0.5, 1.0, 2.0):
        draws = draw(logits, Sampling(temperature), 20_000)
        assert chi_squared(draws, (logits / temperature).softmax(-1)).p_value > 1e-4
    # And the test can tell: another temperature is rejected.
    assert chi_squared(draws, logits.softmax(-1)).p_value < 1e-10


def test_draws_along_one_row_follow_the_distribution():
    """One seed, consecutive draws: what a single reply sees."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(2))
    rows = RowSampling.of([Sampling(1.0, seed=5)] * 20_000, "cpu")
    draws = sample(logits.expand(20_000, -1).clone(), rows, torch.arange(20_000))
    assert chi_squared(draws, logits.softmax(-1)).p_value > 1e-4
    pairs = draws[:-1] * 50 + draws[1:]
    assert chi_squared(pairs, torch.outer(logits.softmax(-1), logits.softmax(-1)).flatten()).p_value > 1e-4


def test_noise_is_gumbel():
    """Mean 0.5772, variance pi^2 / 6, and P(noise < x) = exp(-exp(-x))."""
    noise = gumbel(torch.arange(500), torch.zeros(500, dtype=torch.int64), 2000).flatten()
    assert abs(noise.mean() - 0.57722) < 0.005
    assert abs(noise.var() - torch.pi**2 / 6) < 0.01
    for x in (-1.0, 0.0, 2.0, 5.0):
        assert abs((noise < x).float().mean() - torch.exp(-torch.exp(torch.tensor(-x)))) < 0.002


@settings(deadline=None)
@given(
    vocab=st.integers(2, 60),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_filters_keep_exactly_the_allowed_tokens(vocab, top_k, top_p, min_p, seed):
    """Every draw is allowed; the allowed set by its definition, in float64, away from ties at the border."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    draws = draw(logits, Sampling(1.0, top_k, top_p, min_p), 300)
    probabilities = logits.double().softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or vocab]
    within = probabilities[kept] / probabilities[kept].sum()
    nucleus = kept[(within.cumsum(0) - within) < top_p + 1e-5]
    allowed = [i for i in nucleus.tolist() if probabilities[i] >= min_p * probabilities.max() * (1 - 1e-5)]
    assert set(draws.tolist()) <= set(allowed)


def test_filtered_draws_keep_their_proportions():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    draws = draw(logits, Sampling(1.0, top_k=3), 20_000)
    expected = logits.masked_fill(torch.tensor([False, False, False, True, True]), -torch.inf).softmax(-1)
    assert chi_squared(draws, expected).p_value > 1e-4
    assert set(draws.tolist()) == {0, 1, 2}


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 7), st.integers(0, 2**40))
def test_a_row_does_not_depend_on_the_rows_beside_it(rows, index, seed):
    index %= rows
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 64, generator=generator)
    settings = [Sampling(i % 3 * 0.5, i % 5, 1.0 - 0.1 * (i % 4), 0.0, seed + i) for i in range(rows)]
    draws = torch.randint(0, 1000, (rows,), generator=generator)
    together = sample(logits.clone(), RowSampling.of(settings, "cpu"), draws)
    some = slice(index, index + 1)
    alone = sample(logits[some].clone(), RowSampling.of(settings[some], "cpu"), draws[some])
    assert together[index] == alone[0]


@pytest.mark.parametrize("rows", [1, 5, 8, 9, 23])
def test_draws_in_pieces_are_those_of_all_rows_at_once(rows, monkeypatch):
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(3))
    kinds = [Sampling(), Sampling(0.9, seed=1), Sampling(1.1, top_k=7, seed=2), Sampling(1.0, top_p=0.8, seed=3)]
    settings_, draws = RowSampling.of([kinds[i % 4] for i in range(rows)], "cpu"), torch.arange(rows)
    monkeypatch.setattr(sampling, "DRAWN_ROWS", rows)
    whole = sample(logits, settings_, draws)
    monkeypatch.setattr(sampling, "DRAWN_ROWS", 4)
    assert torch.equal(sample(logits, settings_, draws), whole)


def test_temperature_zero_is_greedy_and_nearly_zero_too():
    logits = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    rows = RowSampling.of([Sampling(0.0, seed=i) for i in range(10)] + [Sampling(1e-5) for _ in range(10)], "cpu")
    draws = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(sample(logits.clone(), rows, draws), logits.argmax(-1))
    assert torch.equal(sample(logits.clone(), rows, draws, Kind(greedy=True)), logits.argmax(-1))


def test_a_step_does_only_what_some_row_asks_for():
    assert Kind.of([Sampling(), Sampling(0.0, top_k=5)]) == Kind(greedy=True, cut=False, filtered=False)
    assert Kind.of([Sampling(), Sampling(0.7)]) == Kind(greedy=False, cut=False, filtered=False)
    assert Kind.of([Sampling(0.7, min_p=0.1)]) == Kind(greedy=False, cut=True, filtered=False)
    assert Kind.of([Sampling(0.7, min_p=0.1), Sampling(0.7, top_p=0.9)]) == Kind(greedy=False, cut=True, filtered=True)


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([Sampling(), Sampling(0.8), Sampling(1.1, 5), Sampling(0.5, 0, 0.7), Sampling(1, 0, 1, 0.2)]),
        min_size=1,
    )
)
def test_what_a_step_leaves_out_changes_nothing(rows):
    logits = torch.randn(len(rows), 80, generator=torch.Generator().manual_seed(len(rows)))
    draws, tensors = torch.arange(len(rows)), RowSampling.of(rows, "cpu")
    assert torch.equal(sample(logits.clone(), tensors, draws, Kind.of(rows)), sample(logits.clone(), tensors, draws))
