"""What a probe makes of the steps that it trained."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import command_settings, config
from nanochat.train import probe
from nanochat.train.probe import midmean, settled
from nanochat.train.prober import Prober


def test_a_probe_validates_once_and_times_none_of_the_steps_around_it(monkeypatch):
    """A validation after every second step would leave half of the timed ones without the update of the step before."""
    read, logs, timed = probe.read_json_lines, [], []
    monkeypatch.setattr(probe, "read_json_lines", lambda path: logs.append(read(path)) or logs[-1])
    monkeypatch.setattr(probe, "midmean", lambda steps: timed.append(steps) or midmean(steps))
    monkeypatch.setattr(probe, "SETTLING_SECONDS", 0.1)
    own = command_settings.PlanSettings(
        stage="base",
        model=config.Model(depth=1, width=16, head_dim=8).resolved(),
        vocab_size=32,
        gpus=0,
        sequence_length=16,
        tokens_per_step=512,
        device_batch_size=None,
        dtype="float32",
        compile="off",
        batch_size=config.BatchSize(),
    )
    for seconds in (0.0, 0.2):
        probe.measure(own, 2, seconds)
        log, steps = logs.pop(), timed.pop()
        assert [line["step"] for line in log if line["val_bpb"] is not None] == [2]
        assert {line["seconds"] for line in log[:3]}.isdisjoint(steps)
        assert len(steps) >= 1
    assert len(log) > 10


def lines(seconds: list[float], start: float = 1000.0) -> list[dict]:
    """A trainer's log of steps that follow each other."""
    ends = [start + sum(seconds[: n + 1]) for n in range(len(seconds))]
    return [{"seconds": one, "time": end} for one, end in zip(seconds, ends, strict=True)]


def test_steps_of_a_rested_gpu_are_not_timed():
    """The first second at 5% above the sustained speed: a median over all would be off by it."""
    fast, sustained = [0.19] * 6, [0.2] * 8
    assert midmean(settled(lines(fast + sustained), 1.1)) == pytest.approx(0.2)
    assert len(settled(lines(fast + sustained), 1.1)) == 8


def test_steps_longer_than_the_settling_are_all_timed():
    assert settled(lines([3.0, 3.1]), 2.0) == [3.0, 3.1]
    assert settled(lines([3.0, 3.1, 3.2]), 2.0) == [3.1, 3.2]


def test_without_settling_all_steps_are_timed():
    assert settled(lines([0.1, 0.2, 0.3]), 0.0) == [0.1, 0.2, 0.3]


@given(st.lists(st.floats(0.1, 10.0), min_size=4, max_size=20), st.floats(10.0, 1e6))
def test_midmean_lies_inside_and_one_slow_step_does_not_move_it_out(values, slow):
    assert min(values) <= midmean(values) * (1 + 1e-9)
    assert midmean(values) <= max(values) * (1 + 1e-9)
    assert midmean([*values, slow]) <= max(values) * (1 + 1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_that_of_steps_whether_or_not_kernels_were_compiled(tmp_path, monkeypatch):
    """Trying kernels out takes memory of its own: the first probe of a search took 5% more than training, which bends its line."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    own = command_settings.PlanSettings(
        stage="base",
        model=config.Model(depth=8).resolved(),
        vocab_size=32_768,
        gpus=1,
        sequence_length=512,
        tokens_per_step=2 * 256 * 512,
        device_batch_size=None,
        dtype="auto",
        compile="on",
        batch_size=config.BatchSize(),
    )
    with Prober(own, 600.0, ahead=False) as tried:
        compiling, compiled = (tried(256) for _ in range(2))
    assert compiling["peak_bytes"] == pytest.approx(compiled["peak_bytes"], rel=0.005)
