"""The loss curve that trainer.py left, and how many steps were taken twice."""

from pathlib import Path


def read(folder: Path) -> tuple[dict[int, float], int]:
    """({step: state}, steps taken more than once); a step taken twice counts with its last value."""
    rows = [line.split() for line in (folder / "curve").read_text().splitlines()]
    curve = {int(step): float(state) for step, state, *_ in rows}
    return curve, len(rows) - len(curve)


def undisturbed(steps: int) -> dict[int, float]:
    state, curve = 1.0, {}
    for step in range(steps):
        state = state * 0.97 + step * 0.001
        curve[step + 1] = state
    return curve
