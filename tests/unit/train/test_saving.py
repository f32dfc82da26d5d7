"""Checkpoints written beside training: what they hold, how they fail, how they survive a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_support import files_equal, losses, make_trainer

from nanochat.train import checkpoint
from nanochat.train.saving import Saver

CPU = torch.device("cpu")


def tensors(value: float, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((size, 8), value), "optimizer.w.momentum": torch.full((size, 8), -value)}


def saver(folder: Path, size: int = 1000, keep: int = 3) -> Saver:
    return Saver(folder, "f", keep, tensors(0.0, size), CPU)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_each_checkpoint_is_that_of_its_step_though_training_went_on(tmp_path, accumulated):
    """As if each had been the last thing that a run did."""
    micro_rows = 8 // accumulated
    running = make_trainer(
        tmp_path / "a", steps=6, micro_rows=micro_rows, checkpoint_every_seconds=0.0, keep_checkpoints=9
    )
    assert running.run()
    for step in (1, 2, 5):
        alone = make_trainer(tmp_path / str(step), steps=6, micro_rows=micro_rows)
        for _ in range(step):
            alone._step(False)
        alone._open_saver()
        alone.save()
        alone._close()
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            path = f"checkpoints/step-{step:08}/{name}"
            assert files_equal(tmp_path / "a" / path, tmp_path / str(step) / path)


@settings(deadline=None, max_examples=20)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5))
def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path_factory, values):
    folder, source = tmp_path_factory.mktemp("checkpoints"), tensors(0.0)
    background = saver(folder, keep=9)
    for step, value in enumerate(values):
        for tensor in source.values():
            tensor.fill_(value)
        background.save(step, source.items(), {"rng.cpu": torch.zeros(4, dtype=torch.uint8)}, {})
        source["model.w"].fill_(float("nan"))  # training goes on
    background.wait()
    background.close()
    for step, value in enumerate(values):
        found = checkpoint.Checkpoint(folder / f"step-{step:08}", step, {})
        assert (found.model()["w"] == torch.tensor(value)).all()
        assert found.optimizer().keys() == {"w.momentum", "rng.cpu"}


def test_a_write_that_failed_is_raised_by_whatever_comes_next(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for surfaces in (Saver.wait, lambda s: s.save(2, tensors(1.0).items(), {}, {})):
        background = saver(tmp_path / "file")
        background.save(1, tensors(1.0).items(), {}, {})
        with pytest.raises(OSError, match="file") as raised:
            surfaces(background)
        assert "checkpoint of step 1" in raised.value.__notes__[0]
        background.wait()  # said once
        background.close()


def test_a_failed_write_ends_the_training_at_the_next_step(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    trainer = make_trainer(tmp_path, steps=500, checkpoint_every_seconds=0.0)
    with pytest.raises(OSError, match="checkpoints"):
        trainer.run()
    assert trainer.step < 50


def test_a_failed_write_leaves_nothing_half_done(tmp_path):
    background = saver(tmp_path)
    background.save(1, tensors(1.0).items(), {}, {})
    background.save(2, tensors(2.0).items(), {}, {"history": float("nan")})  # JSON has no nan
    with pytest.raises(ValueError, match="JSON"):
        background.wait()
    background.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_superseded_attempt_ends_the_training(tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("first")
    monkeypatch.setenv("ATTEMPT_TOKEN", "first")
    monkeypatch.setenv("ATTEMPT_TOKEN_FILE", str(token))
    trainer = make_trainer(tmp_path, steps=10_000, checkpoint_every_seconds=0.0)
    plain = trainer._step

    def step(*arguments):
        if trainer.step == 3:
            token.write_text("second")
        return plain(*arguments)

    trainer._step = step
    with pytest.raises(checkpoint.AttemptSuperseded):
        trainer.run()
    newest = checkpoint.newest_valid(tmp_path / "checkpoints", "fingerprint", print)
    assert newest.step <= 3


def test_what_it_took_is_told_apart(tmp_path):
    trainer = make_trainer(tmp_path, steps=4, checkpoint_every_seconds=0.0)
    trainer.run()
    assert trainer.history.checkpoint_seconds > 0
    assert trainer.history.checkpoint_write_seconds > 0
    newest = checkpoint.newest_valid(tmp_path / "checkpoints", "fingerprint", print)
    assert 0 < newest.state["history"]["checkpoint_write_seconds"] < trainer.history.checkpoint_write_seconds


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_write_leaves_the_checkpoint_before(tmp_path):
    program = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_saving import saver, tensors
background = saver(sys.argv[1], size=400_000, keep=2)
for step in range(1, 10_000):
    background.save(step, tensors(float(step), 400_000).items(), {}, {})
    print(step, flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    for i in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while int(process.stdout.readline()) < 3:
            pass
        time.sleep(0.03 * i)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        said = []
        newest = checkpoint.newest_valid(tmp_path, "f", said.append)
        assert newest.step >= 2
        assert said == []
        assert (newest.model()["w"] == newest.step).all()


def test_a_loss_that_diverges_keeps_the_last_good_checkpoint(tmp_path):
    from test_trainer import poison

    from nanochat.train.trainer import NonFinite

    trainer = make_trainer(tmp_path, steps=12, checkpoint_every_seconds=0.0)
    poison(trainer, at=6)
    with pytest.raises(NonFinite, match="step 7"):
        trainer.run()
    newest = checkpoint.newest_valid(tmp_path / "checkpoints", "fingerprint", print)
    assert newest.step == 6
    assert all(torch.isfinite(tensor).all() for tensor in newest.model().values())
    straight = make_trainer(tmp_path / "straight")
    straight.run()
    again = make_trainer(tmp_path)
    assert again.run()
    assert losses(tmp_path) == losses(tmp_path / "straight")
