"""`nanochat base` as a process: killed, signalled, repeated, on two ranks."""

import json
import os
import signal
from pathlib import Path

import pytest
from training_support import child_pids, files_equal, finish, losses, metrics, start_base, wait_for, write_run

from nanochat.command_settings import stage_settings
from nanochat.config_files import load
from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.train import checkpoint, plan, stages

# metrics.json holds these for every reader: report, workflow.
CONTRACT = {
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "gpu_utilization",
    "device",
    "gpus",
}
CONTRACT |= {"loss_first", "loss_last", "val_bpb", "padding_fraction", "restarts", "commit", "torch"}


def run_here(arguments: dict[str, str], monkeypatch) -> int:
    """The stage in this process."""
    import argparse

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ATTEMPT_TOKEN", "ATTEMPT_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    parser = argparse.ArgumentParser(prog="nanochat base")
    stages.add_arguments(parser)
    return stages.run(parser.parse_args([part for pair in arguments.items() for part in pair]))


def test_a_finished_stage_is_complete_and_not_touched_again(tmp_path, monkeypatch, capfd):
    arguments = write_run(tmp_path, steps=6)
    assert run_here(arguments, monkeypatch) == 0
    out = Path(arguments["--out"])
    assert metrics(arguments).keys() >= CONTRACT
    assert metrics(arguments)["steps"] == metrics(arguments)["steps_planned"] == 6
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_here(arguments, monkeypatch) == 0
    assert "complete already" in capfd.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_outputs_that_snakemake_removed_are_trained_again_to_the_same_bytes(tmp_path, monkeypatch):
    arguments = write_run(tmp_path, steps=6)
    run_here(arguments, monkeypatch)
    out = Path(arguments["--out"])
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "metrics.json").unlink()
    assert run_here(arguments, monkeypatch) == 0
    assert (out / "model.safetensors").read_bytes() == weights
    assert metrics(arguments)["restarts"] == 0


def test_checkpoints_that_a_killed_attempt_left_do_not_spare_the_next_training(tmp_path, monkeypatch):
    arguments = write_run(tmp_path, steps=6)
    with monkeypatch.context() as killed:
        killed.setattr(stages.shutil, "rmtree", lambda *_, **__: None)
        run_here(arguments, monkeypatch)
    assert list(Path(arguments["--checkpoints"]).iterdir())
    assert run_here(arguments, monkeypatch) == 0  # the requeued attempt: all is complete
    assert not Path(arguments["--checkpoints"]).exists()


def test_settings_of_another_stage_are_refused(tmp_path, monkeypatch):
    arguments = write_run(tmp_path)
    settings = read_json(tmp_path / "base.json")
    write_json(tmp_path / "base.json", settings | {"stage": "sft"})
    with pytest.raises(UserError, match=r"base\.json: stage = 'sft': these are not the settings of base"):
        run_here(arguments, monkeypatch)


def test_changed_settings_train_anew(tmp_path, monkeypatch):
    arguments = write_run(tmp_path, steps=6)
    run_here(arguments, monkeypatch)
    write_run(tmp_path, steps=6, learning_rate_scale=0.5)
    before = metrics(arguments)["loss_last"]
    assert run_here(arguments, monkeypatch) == 0
    assert metrics(arguments)["loss_last"] != before
    assert not Path(arguments["--checkpoints"]).exists()


def test_what_is_probably_not_meant_is_said():
    every = stage_settings(load({"train": {"sft": {"profile_steps": [20, 22]}}}))
    few, late = stages._remarks(every["sft"], 1, 30_000)
    assert "only 1 step: an epoch of train.sft.mixture has 30,000 tokens, a step takes 65,536" in few
    assert "train.sft.profile_steps = [20, 22]: the training ends at step 1" in late
    (cut,) = stages._remarks(every["mid"], 200, 9_000_000, truncated=1234)
    assert "1,234 conversations are longer than train.mid.sequence_length = 2048 and were cut" in cut
    every = stage_settings(load({}))
    assert stages._remarks(every["sft"], 200, 9_000_000) == stages._remarks(every["base"], 3, 100) == []


def test_a_newer_attempt_elsewhere_ends_this_one(tmp_path, monkeypatch):
    arguments = write_run(tmp_path, steps=6)
    token = tmp_path / "token"
    token.write_text("2")
    code, output = finish(start_base(arguments, ATTEMPT_TOKEN="1", ATTEMPT_TOKEN_FILE=str(token)))
    assert code == 88, output
    assert not (Path(arguments["--out"]) / "metrics.json").exists()


def test_a_tokenizer_of_another_run_is_refused(tmp_path, monkeypatch):
    arguments = write_run(tmp_path)
    listed = tmp_path / "tokens" / "metrics.json"
    write_json(listed, read_json(listed) | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match="belongs to another run"):
        run_here(arguments, monkeypatch)


def test_a_plan_for_other_sizes_is_refused(tmp_path):
    write_json(tmp_path / "plan.json", {"tokens_per_step": 64, "sequence_length": 16, "device_batch_size": 4})
    with pytest.raises(UserError, match="tokens_per_step = 64"):
        plan.read_plan(tmp_path / "plan.json", 128, 16)
    with pytest.raises(UserError, match="no multiple of 3 ranks"):
        plan.accumulation(8, 3, 4, tmp_path / "plan.json")
    with pytest.raises(UserError, match="Nearest: 496 or 512"):
        plan.rows_per_step(500, 16, 1, "train.base")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    straight = write_run(tmp_path / "a", steps=80)
    assert finish(start_base(straight))[0] == 0
    killed = write_run(tmp_path / "b", steps=80, checkpoint_every_seconds=0.0)
    folder = Path(killed["--checkpoints"])
    process = start_base(killed)
    wait_for(lambda: len(list(folder.glob("step-*"))) > 1, process)
    process.kill()
    process.wait()
    # The newest may be damaged by the node's crash as well.
    newest = max(folder.glob("step-*"))
    (newest / "model.safetensors").write_bytes(b"half")
    code, output = finish(start_base(killed))
    assert code == 0, output
    assert f"skipping the damaged checkpoint {newest.name}" in output
    assert "going on from" in output
    assert metrics(killed)["restarts"] == 1
    assert losses(Path(killed["--out"])) == losses(Path(straight["--out"]))
    assert files_equal(Path(killed["--out"]) / "model.safetensors", Path(straight["--out"]) / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stop_signal_saves_and_says_not_finished(tmp_path, number):
    """The checkpoint of the last step is whole when the process ends, also when another was being written."""
    arguments = write_run(tmp_path, steps=5_000, checkpoint_every_seconds=0.0)
    process = start_base(arguments)
    wait_for(lambda: len(list(Path(arguments["--checkpoints"]).glob("step-*"))) > 1, process)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 85, output
    saved = sorted(Path(arguments["--checkpoints"]).iterdir())
    assert len(saved) == 2, "no half-written one beside the two that are kept"
    newest = checkpoint.newest_valid(saved[-1].parent, read_json(saved[-1] / "state.json")["fingerprint"], print)
    assert newest.step == max(losses(Path(arguments["--out"])))
    assert newest.step < 5_000
    assert not (Path(arguments["--out"]) / "metrics.json").exists()


@pytest.mark.slow
def test_two_ranks_equal_one_and_resume_on_one(tmp_path):
    """Real processes over gloo: the same losses within rounding; a run of two ranks goes on as one."""
    alone = write_run(tmp_path / "one", steps=24)
    assert finish(start_base(alone))[0] == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    both = write_run(tmp_path / "two", steps=24)
    code, output = finish(start_base(both, launcher))
    assert code == 0, output
    one, two = losses(Path(alone["--out"])), losses(Path(both["--out"]))
    assert two == pytest.approx(one, rel=1e-3)
    assert metrics(both)["tokens"] == metrics(alone)["tokens"]
    assert metrics(both)["val_bpb"] == pytest.approx(metrics(alone)["val_bpb"], rel=1e-3)

    stopped = write_run(tmp_path / "three", steps=24, checkpoint_every_seconds=0.0)
    process = start_base(stopped, launcher)
    wait_for(lambda: any(Path(stopped["--checkpoints"]).glob("step-*")), process)
    # One rank alone is told to stop; both must agree.
    lowest = min(child_pids(process.pid))
    os.kill(lowest, signal.SIGUSR2)
    process.communicate(timeout=120)
    if not (Path(stopped["--out"]) / "metrics.json").exists():
        assert finish(start_base(stopped))[0] == 0
    assert losses(Path(stopped["--out"])) == pytest.approx(one, rel=1e-3)


def test_log_lines_are_plain_json(tmp_path, monkeypatch):
    arguments = write_run(tmp_path, steps=4)
    run_here(arguments, monkeypatch)
    lines = [json.loads(line) for line in (Path(arguments["--out"]) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "learning_rate_scale", "tokens", "tokens_per_second", "seconds", "grad_norm", "time"} <= lines[
        0
    ].keys()
    assert lines[3]["val_bpb"] > 0
