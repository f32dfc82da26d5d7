"""The loop: resuming, accumulation, weighting, schedule, stopping."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from training_support import ROWS, PlainLoader, files_equal, losses, make_trainer, training_settings, weights_equal

from nanochat.files import read_json_lines
from nanochat.train.trainer import NonFinite, Trainer, learning_rate_scale


class StopsAt(Trainer):
    """Receives a signal during a given step, as from SLURM."""

    stop_at = 5
    number = signal.SIGTERM

    def _step(self, *arguments):
        if self.step == self.stop_at - 1:
            os.kill(os.getpid(), self.number)
            arguments = (True, arguments[1])
        return super()._step(*arguments)


def test_training_learns(tmp_path):
    trainer = make_trainer(tmp_path, steps=40)
    assert trainer.run()
    history = trainer.history
    assert history.loss_first == pytest.approx(math.log(67), rel=0.01)
    assert history.loss_last < 0.6 * history.loss_first
    curve = [bpb for _, bpb in history.val_bpb]
    assert curve[-1] < curve[0]
    assert [step for step, _ in history.val_bpb] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_resume_is_bitwise(tmp_path, number):
    straight = make_trainer(tmp_path / "a")
    assert straight.run()
    stopped = make_trainer(tmp_path / "b", kind=type("Stops", (StopsAt,), {"number": number}))
    assert not stopped.run()
    assert stopped.step == 5
    resumed = make_trainer(tmp_path / "b", seed=99)  # other first weights: they must come from the checkpoint
    assert resumed.run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert weights_equal(resumed.model, straight.model)
    assert resumed.history.restarts == 1
    assert resumed.history.tokens == straight.history.tokens
    last = "checkpoints/step-00000012/optimizer.safetensors"
    assert files_equal(tmp_path / "a" / last, tmp_path / "b" / last)


def test_steps_after_a_checkpoint_are_done_again_and_logged_last(tmp_path):
    straight = make_trainer(tmp_path / "a")
    straight.run()
    lost = make_trainer(tmp_path / "b", kind=type("Stops", (StopsAt,), {"stop_at": 4}))
    lost.run()
    # Steps 5 and 6 ran and were logged, but no checkpoint has them.
    more = make_trainer(tmp_path / "b")
    more._resume()
    from nanochat.files import append_json_line

    for _ in range(2):
        append_json_line(more.log, more._step(False, False)[0] | {"loss": -1.0})
    assert make_trainer(tmp_path / "b").run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert len(read_json_lines(tmp_path / "b" / "log.jsonl")) == 14


@pytest.mark.parametrize("hidden", [0.0, 0.7])
def test_accumulation_changes_nothing_but_rounding(tmp_path, hidden):
    """With hidden targets the micro-batches hold different numbers of them; the first row holds none."""
    runs = {}
    for rows in (1, 2, ROWS):
        trainer = make_trainer(tmp_path / str(rows), steps=6, loader=PlainLoader(hidden=hidden), micro_rows=rows)
        trainer.run()
        runs[rows] = list(losses(tmp_path / str(rows)).values())
        assert trainer.history.target_tokens == 6 * ROWS * 16 if not hidden else trainer.history.target_tokens < 400
    assert runs[1] == pytest.approx(runs[ROWS], rel=2e-4)
    assert runs[2] == pytest.approx(runs[ROWS], rel=2e-4)


def test_loss_is_the_mean_over_the_targets_of_the_whole_step(tmp_path):
    loader = PlainLoader(hidden=0.7)
    trainer = make_trainer(tmp_path, loader=loader, micro_rows=1)
    inputs, targets = (torch.from_numpy(a) for a in loader.micro_batch(0, 0, ROWS))
    with torch.no_grad():
        trainer.model.head.normal_(generator=torch.Generator().manual_seed(0))
        expected = trainer.model(inputs, targets, reduction="none").sum() / (targets >= 0).sum()
    assert trainer._step(False, False)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_without_any_target_changes_no_weight(tmp_path):
    trainer = make_trainer(tmp_path, loader=PlainLoader(hidden=1.0))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    line = trainer._step(False, False)[0]
    assert line["loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("micro_rows", [1, 2, 4, 8])
def test_each_row_of_a_step_is_seen_once(tmp_path, micro_rows):
    loader = PlainLoader()
    trainer = make_trainer(tmp_path, loader=loader, micro_rows=micro_rows)
    trainer._step(False, False)
    assert sorted(loader.asked) == [(0, row) for row in range(ROWS)]


def poison(trainer: Trainer, at: int) -> None:
    """Let the model give nan for row 5 of step `at`."""
    plain = trainer.forward

    def forward(*arguments, **options):
        value = plain(*arguments, **options)
        step, row = trainer.loader.asked[-1]
        return value * float("nan") if (step, row) == (at, 5) else value

    trainer.forward = forward


def test_a_loss_that_is_not_finite_stops_before_the_weights_and_names_its_rows(tmp_path):
    trainer = make_trainer(tmp_path, micro_rows=2)
    poison(trainer, at=3)
    with pytest.raises(NonFinite, match=r"step 4: the loss of rows 4 to 5"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(torch.isfinite(t).all() for t in trainer.optimizer.state_dict().values())
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert max(losses(tmp_path)) == 3


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path):
    trainer = make_trainer(tmp_path, micro_rows=2, on_nonfinite="skip")
    poison(trainer, at=3)
    assert trainer.run()
    assert trainer.history.skipped_steps == 1
    assert losses(tmp_path)[4] is None
    assert np.isfinite(trainer.history.loss_last)


def test_schedule_rises_stays_and_falls():
    train = training_settings(warmup_fraction=0.1, decay_fraction=0.4, final_learning_rate_fraction=0.2).train
    scales = [learning_rate_scale(step, 100, train) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(scales[10:60]) == {1.0}
    assert scales[60] == 1.0
    assert scales[80] == pytest.approx(0.6)
    assert scales[99] == pytest.approx(0.2 + 0.8 / 40)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_a_tiny_run_is_defined(steps):
    train = training_settings(warmup_fraction=1.0, decay_fraction=1.0).train
    assert all(0 < learning_rate_scale(step, steps, train) <= 1 for step in range(steps))
