"""The arithmetic of scores."""

import math
from dataclasses import dataclass
from statistics import NormalDist


def centred(score: float, baseline: float) -> float:
    """0 is chance, 1 is perfect; below chance it is negative (as CORE does it, Li et al. 2024)."""
    return (score - baseline) / (1 - baseline)


def interval(score: float, items: int, level: float = 0.95) -> tuple[float, float]:
    """Between what a share of right answers lies, of all items like these (Wilson 1927): sensible at 0, at 1 and for few items."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = score + z * z / (2 * items)
    half = z * math.sqrt(score * (1 - score) / items + (z / (2 * items)) ** 2)
    scale = 1 + z * z / items
    return min(score, max(0.0, (middle - half) / scale)), max(score, min(1.0, (middle + half) / scale))


@dataclass(frozen=True)
class TaskScore:
    """The result of one task."""

    score: float
    baseline: float | None  # of chance; None where there is no such thing
    items: int
    unit: str  # fraction, or bits/byte
    description: str
    facts: dict  # whatever else is worth keeping

    def as_json(self, seconds: float) -> dict:
        return {
            "score": self.score,
            "baseline": self.baseline,
            "centred_score": None if self.baseline is None else centred(self.score, self.baseline),
            "items": self.items,
            "interval": interval(self.score, self.items) if self.unit == "fraction" else None,
            "seconds": seconds,
            "unit": self.unit,
            "description": self.description,
            **self.facts,
        }
