"""Pearson's chi-squared test: do these draws follow that distribution?"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_EXPECTATION = 5.0  # per cell, below which the statistic is not chi-squared distributed (Cochran 1954)


@dataclass(frozen=True)
class ChiSquared:
    """The statistic, its degrees of freedom, and how probable one at least as large is when the distribution is right."""

    chi2: float
    degrees: int
    p_value: float


def chi_squared(draws: Tensor, probabilities: Tensor) -> ChiSquared:
    """Test draws (N,) int64 of token ids against probabilities (V,).

    Tokens that are expected fewer than 5 times share one cell. With a single cell nothing can be tested: p = 1.
    """
    expected = probabilities.double().cpu() * draws.numel()
    observed = torch.bincount(draws.cpu(), minlength=expected.numel()).double()
    common = expected >= SMALLEST_EXPECTATION
    cells = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([observed[common], observed[~common].sum()[None]])
    if (
        cells[-1] < SMALLEST_EXPECTATION and len(cells) > 1
    ):  # too rare even together: part of the rarest common token's cell
        rarest = int(cells[:-1].argmin())
        cells[rarest] += cells[-1]
        counts[rarest] += counts[-1]
        cells, counts = cells[:-1], counts[:-1]
    chi2 = float(((counts - cells) ** 2 / cells).sum())
    degrees = len(cells) - 1
    if degrees == 0:
        return ChiSquared(chi2, 0, 1.0)
    # The upper tail of chi-squared with k degrees is the regularised upper incomplete gamma function Q(k / 2, x / 2).
    tail = torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(chi2 / 2).double())
    return ChiSquared(chi2, degrees, float(tail))
