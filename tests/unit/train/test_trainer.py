"""The loop: resuming, accumulation, weighting, schedule, stopping."""

import gc
import gzip
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from training_support import (
    LENGTH,
    ROWS,
    PlainLoader,
    files_equal,
    losses,
    make_trainer,
    training_settings,
    weights_equal,
    write_documents,
)

from nanochat.files import read_json_lines
from nanochat.train.trainer import NonFinite, Trainer, learning_rate_scale


class StopsAt(Trainer):
    """Receives a signal during a given step, as from SLURM."""

    stop_at = 5
    number = signal.SIGTERM

    def _step(self, *arguments):
        if self.step == self.stop_at - 1:
            os.kill(os.getpid(), self.number)
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


def test_a_signal_in_the_middle_of_a_step_is_obeyed_at_its_end_without_a_validation(tmp_path):
    straight = make_trainer(tmp_path / "a")
    straight.run()
    stopped = make_trainer(tmp_path / "b")
    forward = stopped.forward

    def interrupted(*arguments, **options):
        if stopped.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments, **options)

    stopped.forward = interrupted
    assert not stopped.run()
    assert (stopped.step, stopped.history.val_bpb) == (4, [])
    resumed = make_trainer(tmp_path / "b")
    assert resumed.run()
    assert resumed.history.val_bpb == straight.history.val_bpb
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("micro_rows", [ROWS, 2])
def test_resume_is_bitwise_when_compiled_and_accumulated(tmp_path, micro_rows):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    options = {"compile": "on", "micro_rows": micro_rows}
    straight = make_trainer(tmp_path / "a", **options)
    assert straight.run()
    assert not make_trainer(tmp_path / "b", kind=StopsAt, **options).run()
    torch.compiler.reset()  # a new process compiles anew
    resumed = make_trainer(tmp_path / "b", seed=99, **options)
    assert resumed.run()
    assert resumed.history.compile_seconds > 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert weights_equal(resumed.model, straight.model)


@pytest.mark.parametrize("micro_rows", [1, 4])
def test_resume_is_bitwise_with_accumulation(tmp_path, micro_rows):
    straight = make_trainer(tmp_path / "a", micro_rows=micro_rows, loader=PlainLoader(hidden=0.5))
    assert straight.run()
    assert not make_trainer(tmp_path / "b", kind=StopsAt, micro_rows=micro_rows, loader=PlainLoader(hidden=0.5)).run()
    resumed = make_trainer(tmp_path / "b", micro_rows=micro_rows, loader=PlainLoader(hidden=0.5))
    assert resumed.run()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert weights_equal(resumed.model, straight.model)


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
        append_json_line(more.log, more._step(False)[0] | {"loss": -1.0})
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
    assert trainer._step(False)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_without_any_target_changes_no_weight(tmp_path):
    trainer = make_trainer(tmp_path, loader=PlainLoader(hidden=1.0))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    line = trainer._step(False)[0]
    assert line["loss"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("micro_rows", [1, 2, 4, 8])
def test_each_row_of_a_step_is_seen_once(tmp_path, micro_rows):
    loader = PlainLoader()
    trainer = make_trainer(tmp_path, steps=1, loader=loader, micro_rows=micro_rows)
    trainer._step(False)
    assert sorted(loader.asked) == [(0, row) for row in range(ROWS)]


def poison(trainer: Trainer, at: int) -> None:
    """Let the model give nan for row 5 of step `at`."""
    plain, row = trainer.forward, torch.from_numpy(PlainLoader().micro_batch(at, 5, 1)[0])

    def forward(inputs, *arguments, **options):
        value = plain(inputs, *arguments, **options)
        return value * float("nan") if (inputs == row).all(1).any() else value

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


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path):
    """Neither weights nor the optimizer's state remember it."""
    trainer = make_trainer(tmp_path, micro_rows=2, on_nonfinite="skip")
    poison(trainer, at=3)
    for _ in range(3):
        trainer._step(False)
    weights = [p.detach().clone() for p in trainer.model.parameters()]
    state = trainer.optimizer.state_dict()
    line = trainer._step(False)[0]
    assert (line["loss"], line["grad_norm"]) == (None, None)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.optimizer.state())


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.head.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFinite, match=r"step 1: the gradient .* of rows 0 to 7"):
        trainer.run()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_batches_hold_distinct_rows_of_many_documents(tmp_path):
    """What the model itself is given in a step: no row is there twice, no document fills the batch."""
    from nanochat.data.loader import PretrainLoader
    from nanochat.data.token_shards import TokenShards

    documents = 300
    shards = TokenShards.open(write_documents(tmp_path, documents), "train")
    seen = []
    trainer = make_trainer(tmp_path / "run", loader=PretrainLoader(shards, ROWS, LENGTH, seed=1), micro_rows=2)
    plain = trainer.forward

    def forward(inputs, *arguments, **options):
        seen.extend(inputs.tolist())
        return plain(inputs, *arguments, **options)

    trainer.forward = forward
    trainer._step(False)
    trainer._batches.close()
    assert len({tuple(row) for row in seen}) == len(seen) == ROWS
    starts = shards.documents()
    whole = shards.read(0, shards.total_tokens).tolist()
    places = [next(i for i in range(len(whole)) if whole[i : i + LENGTH] == row) for row in seen]
    owners = {int(np.searchsorted(starts, place, side="right")) for place in places}
    assert len(owners) >= ROWS - 1


def test_garbage_is_not_collected_inside_of_a_step_and_is_again_afterwards(tmp_path):
    enabled = []

    class Looks(Trainer):
        def _step(self, *arguments):
            enabled.append(gc.isenabled())
            return super()._step(*arguments)

    make_trainer(tmp_path, steps=3, kind=Looks).run()
    assert enabled == [False] * 3
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_trace_of_some_steps_changes_no_result(tmp_path):
    make_trainer(tmp_path / "a", steps=5).run()
    make_trainer(tmp_path / "b", steps=5, profile_steps=[2, 3]).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    with gzip.open(tmp_path / "b/trace-2-3-rank0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::_fused_adamw_") == 5 * 2, "two embeddings, head and the smear's two, in two steps"
    assert not list((tmp_path / "a").glob("trace-*"))


def test_a_trace_is_written_when_the_run_stops_before_its_end(tmp_path):
    make_trainer(tmp_path, kind=StopsAt, profile_steps=[4, 9]).run()
    assert (tmp_path / "trace-4-9-rank0.json.gz").exists()


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
