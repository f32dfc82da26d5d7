"""The arithmetic of scores."""

from dataclasses import dataclass


def centred(score: float, baseline: float) -> float:
    """0 is chance, 1 is perfect; below chance it is negative (as CORE does it, Li et al. 2024)."""
    return (score - baseline) / (1 - baseline)


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
            "seconds": seconds,
            "unit": self.unit,
            "description": self.description,
            **self.facts,
        }
