"""Checkpoints are whole or passed over by name; an attempt that is no longer the newest writes nothing."""

import json
import shutil

import pytest
import torch

from nanochat.train import checkpoint


def save(folder, step, fingerprint="f", keep=3):
    tensors = {"w": torch.full((4, 4), float(step))}
    return checkpoint.save(folder, step, fingerprint, tensors, {"w.momentum": tensors["w"]}, {"history": {}}, keep)


def newest(folder, fingerprint="f"):
    said = []
    return checkpoint.newest_valid(folder, fingerprint, said.append), said


def test_newest_is_found_and_only_the_last_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=2)
    found, said = newest(tmp_path)
    assert (found.step, said) == (100, [])
    assert found.model()["w"][0, 0] == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    found, said = newest(tmp_path)
    assert found.step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_half_written_folders_never_count_and_are_cleared_away(tmp_path):
    save(tmp_path, 1)
    half = tmp_path / ".step-00000002.123.tmp"
    shutil.copytree(tmp_path / "step-00000001", half)
    assert newest(tmp_path)[0].step == 1
    save(tmp_path, 3)
    assert not half.exists()


def test_checkpoints_of_other_settings_are_left_alone(tmp_path):
    save(tmp_path, 9, fingerprint="other")
    assert newest(tmp_path) == (None, [])
    save(tmp_path, 2)
    assert newest(tmp_path)[0].step == 2
    assert (tmp_path / "step-00000009").exists()
    save(tmp_path, 3)
    checkpoint.prune(tmp_path, "f", 1, newest=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]


def test_a_damaged_newer_one_does_not_cost_the_one_just_saved(tmp_path):
    path = save(tmp_path, 120, keep=1) / checkpoint.MODEL
    path.write_bytes(path.read_bytes()[:-1])
    for step in (5, 10):
        save(tmp_path, step, keep=1)
        assert newest(tmp_path)[0].step == step
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000120"]


def test_a_disk_that_does_not_answer_costs_one_checkpoint_not_the_training(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    checksum = checkpoint.require_checksum

    def failing(path, *more):
        if path.parent.name == "step-00000002":
            raise OSError(5, "Input/output error", str(path))
        return checksum(path, *more)

    monkeypatch.setattr(checkpoint, "require_checksum", failing)
    found, said = newest(tmp_path)
    assert found.step == 1
    assert "step-00000002, which cannot be read" in said[0]


def test_a_step_that_other_settings_have_saved_too_stays_theirs(tmp_path):
    save(tmp_path, 4, fingerprint="other")
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert newest(tmp_path)[0].step == newest(tmp_path, "other")[0].step == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000004-f"]


def test_the_same_step_can_be_saved_again(tmp_path):
    (save(tmp_path, 4) / checkpoint.MODEL).write_bytes(b"")
    save(tmp_path, 4)
    assert newest(tmp_path)[0].step == 4
    assert len(list(tmp_path.iterdir())) == 1


def test_an_attempt_that_is_not_the_newest_writes_nothing(tmp_path, monkeypatch):
    token = tmp_path / "token"
    monkeypatch.setenv("ATTEMPT_TOKEN", "first")
    monkeypatch.setenv("ATTEMPT_TOKEN_FILE", str(token))
    folder = tmp_path / "checkpoints"
    save(folder, 1)  # no file yet: nothing to compare with
    token.write_text("first\n")
    save(folder, 2)
    token.write_text("second\n")
    with pytest.raises(checkpoint.AttemptSuperseded, match="second"):
        save(folder, 3)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002"]


def test_state_is_json_that_says_what_belongs_to_it(tmp_path):
    state = json.loads((save(tmp_path, 7) / checkpoint.STATE).read_text())
    assert state["step"] == 7
    assert set(state["files"]) == {checkpoint.MODEL, checkpoint.OPTIMIZER}
