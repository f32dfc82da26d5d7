"""A plan's maximum is held against what the device really bears."""

import math
from collections.abc import Callable

import pytest

from nanochat.benchmark.plans import check_maximum

CAPACITY, MARGIN = 1000, 0.15  # so that 850 is the limit


def checked(named: int, peak: Callable[[int], float]) -> dict:
    probes = [{"device_batch_size": size, "ok": True, "peak_bytes": peak(size)} for size in (32, 64)]
    probes.append({"device_batch_size": 128, "ok": False, "peak_bytes": None})
    plan = {"max_device_batch_size": named, "capacity_bytes": CAPACITY, "margin": MARGIN, "probes": probes}
    return check_maximum(plan, peak)


@pytest.mark.parametrize(
    ("named", "error", "holds"),
    [(75, 0.0, True), (77, 2 / 75, True), (73, -2 / 75, True), (79, 4 / 75, False), (71, -4 / 75, False)],
)
def test_the_error_of_a_maximum_is_that_of_the_rows_it_names(named, error, holds):
    """By a law of 100 + 10 bytes a row 75 rows fit; 3% are about two of them."""
    found = checked(named, lambda size: 100 + 10 * size)
    assert found["true_maximum"] == pytest.approx(75)
    assert found["maximum_error"] == pytest.approx(error)
    assert found["maximum_holds"] is holds
    assert found["largest_peak_bytes"] == 100 + 10 * named


@pytest.mark.parametrize(("named", "holds"), [(71, True), (78, False)])
def test_a_maximum_that_does_not_run_holds_if_a_little_less_does(named, holds):
    """More than 70 rows run out of memory, whatever the line says."""
    found = checked(named, lambda size: 10 * size if size <= 70 else math.inf)
    assert found == {"maximum_holds": holds}
