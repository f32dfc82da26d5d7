"""TensorBoard and Weights & Biases: what they receive, and what a user reads when one is not installed."""

import importlib.util

import pytest
from training_support import losses, make_trainer

from nanochat.check import check
from nanochat.config import Config, Corpus, Tokenizer, Train
from nanochat.errors import UserError
from nanochat.train.trackers import CURVES, require_installed

MISSING = [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(not MISSING, reason="both are installed here")
def test_a_missing_package_is_found_before_anything_is_queued(tmp_path):
    train, corpus = Train(trackers=MISSING), Corpus(source="bundled")
    settings = Config(results=str(tmp_path), train=train, corpus=corpus, tokenizer=Tokenizer(vocab_size=1024))
    with pytest.raises(UserError, match=rf"train\.trackers = .*{MISSING[0]} is not installed\. pip install"):
        check(settings, [])
    require_installed([])


def test_every_curve_is_in_the_log(tmp_path):
    trainer = make_trainer(tmp_path, steps=4)
    trainer.run()
    line = trainer.log.read_text().splitlines()[-1]
    assert all(f'"{name}"' in line for name in CURVES)


def test_tensorboard_shows_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, steps=6, trackers=["tensorboard"]).run()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    curve = {event.step: event.value for event in shown.Scalars("base/loss")}
    assert curve == pytest.approx(losses(tmp_path))
    assert [event.step for event in shown.Scalars("base/val_bpb")] == [4, 6]


def test_weights_and_biases_keeps_one_run_over_all_attempts(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for steps in (2, 4):
        make_trainer(tmp_path, steps=steps, trackers=["wandb"]).run()
    (identity,) = (path.read_text() for path in (tmp_path / "wandb").glob("id-*"))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(identity in run.name for run in runs)  # a number follows where two begin in the same second
    # Another training's steps begin at 1 again: in that run they would be dropped.
    anew = make_trainer(tmp_path, steps=2, trackers=["wandb"])
    anew.fingerprint = "another"
    anew.run()
    assert len(list((tmp_path / "wandb").glob("id-*"))) == 2
