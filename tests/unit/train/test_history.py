"""What a run has done, over all its attempts."""

import pytest

from nanochat.train.history import History


def test_utilization_is_of_all_attempts_weighed_by_their_length():
    """Else 23 hours at 97% and a last attempt of ten minutes at 80% would count as 80%."""
    history = History()
    for mean, samples in ((0.97, 9000), (0.8, 1000)):
        history.gpu_utilization, history.gpu_utilization_samples = history.with_utilization(mean, samples)
    assert history.gpu_utilization == pytest.approx(0.953)
    assert history.with_utilization(None, 0) == (history.gpu_utilization, 10_000)
    assert History().with_utilization(None, 0) == (None, 0)
