"""Numbers come back as they were when they were asked for, without waiting for what is queued behind them."""

import time

import pytest
import torch

from nanochat.transfer import Readback


def test_a_readback_holds_what_was_there_when_it_was_asked_for():
    values = torch.tensor([1.0, 2.5], dtype=torch.float64)
    numbers = Readback(values)
    values.zero_()
    assert numbers.wait() == [1.0, 2.5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_readback_does_not_wait_for_what_is_queued_behind_it():
    values, matrix = torch.ones(2, device="cuda"), torch.ones(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    numbers = Readback(values)
    values.zero_()
    for _ in range(20):
        matrix = matrix @ matrix * 0
    assert numbers.wait() == [1.0, 1.0]
    first = time.perf_counter() - started
    torch.cuda.synchronize()
    assert first < 0.5 * (time.perf_counter() - started)
