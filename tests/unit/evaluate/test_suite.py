import json
import math

import pytest

from nanochat.cli import main
from nanochat.command_settings import stage_settings
from nanochat.config import Config
from nanochat.data.tokenizer import Tokenizer
from nanochat.evaluate import suite
from nanochat.model.files import save_model

TASKS = ("bits_per_byte", "cloze", "multiple_choice", "humaneval")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, build_model):
    """A run up to its models, which are random: corpus, tokenizer and tokens through their own commands."""
    folder = tmp_path_factory.mktemp("run")
    small = {
        "corpus": {"source": "bundled", "max_bytes": 1_500_000, "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 600},
        "evaluate": {"gpus": 0, "items": 24, "humaneval_problems": 4, "humaneval_tokens": 8, "validation_tokens": 2000},
    }
    small["evaluate"] |= {"sample_tokens": 10}
    for name, settings in stage_settings(Config.model_validate(small)).items():
        (folder / f"{name}.json").write_text(settings.model_dump_json())
    for name, more in (
        ("corpus", []),
        ("tokenizer", ["--corpus", "corpus"]),
        ("tokens", ["--corpus", "corpus", "--tokenizer", "tokenizer"]),
    ):
        paths = [word if word.startswith("--") else str(folder / word) for word in more]
        assert main([name, "--config", str(folder / f"{name}.json"), *paths, "--out", str(folder / name)]) == 0
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for stage in ("base", "sft"):
        extra = {"stage": stage, "step": 1, "tokenizer_sha256": tokenizer.sha256}
        save_model(folder / stage, build_model(tokenizer.vocab_size, length=160), extra)
    return folder


def evaluate(folder, stage: str, out: str) -> int:
    paths = {
        "config": "evaluate.json",
        "model": stage,
        "tokenizer": "tokenizer",
        "corpus": "corpus",
        "tokens": "tokens",
    }
    arguments = [word for key, path in paths.items() for word in (f"--{key}", str(folder / path))]
    return main(["evaluate", *arguments, "--out", str(folder / out)])


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_the_file_holds_each_score_beside_chance(run_folder, stage):
    assert evaluate(run_folder, stage, f"evaluate/{stage}.json") == 0
    content = json.loads((run_folder / f"evaluate/{stage}.json").read_text())
    assert content["stage"] == stage
    assert tuple(content["tasks"]) == TASKS
    for task in content["tasks"].values():
        assert task.keys() >= {"score", "baseline", "centred_score", "items", "seconds", "unit", "description"}
    assert content["val_bpb"] == content["tasks"]["bits_per_byte"]["score"] > 0
    assert content["tasks"]["multiple_choice"]["baseline"] == 0.25
    assert 0 < content["tasks"]["cloze"]["baseline"] < 0.2
    kinds = [sample["kind"] for sample in content["samples"]]
    assert kinds == ["prompt"] * 3 + (["question"] * 3 if stage == "sft" else [])
    assert content.keys() >= {"device", "seconds", "commit", "torch"}


def test_scores_are_the_same_at_every_run(run_folder):
    for out in ("first.json", "second.json"):
        evaluate(run_folder, "sft", out)
    first, second = (json.loads((run_folder / out).read_text()) for out in ("first.json", "second.json"))
    assert first["samples"] == second["samples"]
    for task in TASKS:
        assert first["tasks"][task]["score"] == second["tasks"][task]["score"]
        assert math.isfinite(first["tasks"][task]["score"])


def test_a_task_that_the_text_gives_nothing_for_is_left_out_and_the_others_stay(run_folder, monkeypatch, capfd):
    """Code, or another script: it showed after the training, and took the other scores with it."""
    monkeypatch.setattr(suite.heldout, "cloze_items", lambda *_: [])
    assert evaluate(run_folder, "base", "without.json") == 0
    tasks = json.loads((run_folder / "without.json").read_text())["tasks"]
    assert (tasks["cloze"]["score"], tasks["cloze"]["items"]) == (None, 0)
    assert "no item of cloze" in tasks["cloze"]["skipped"]
    assert "cloze: left out" in capfd.readouterr().err
    assert tasks["bits_per_byte"]["score"] > 0
    assert tasks["humaneval"]["items"] == 4


def test_the_tokenizer_of_another_run_is_refused(run_folder, build_model, capsys):
    extra = {"stage": "sft", "step": 1, "tokenizer_sha256": "0" * 64}
    save_model(run_folder / "foreign", build_model(600, length=160), extra)
    assert evaluate(run_folder, "foreign", "foreign.json") == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_one_question_through_the_command(run_folder, capsys):
    arguments = ["-q", "Hello", "--max-tokens", "5", "--temperature", "0"]
    assert main(["chat", "-m", str(run_folder / "sft"), *arguments]) == 0
    assert main(["chat", "-m", str(run_folder / "sft"), "--temperature", "-1", "-q", "x"]) == 2
    assert "temperature = -1.0: must be 0 (greedy) or more" in capsys.readouterr().err


def test_a_folder_without_a_model_is_named(run_folder, capsys):
    assert main(["chat", "-m", str(run_folder), "-q", "x"]) == 2
    told = capsys.readouterr().err
    assert f"-m {run_folder}: holds no model. It has {run_folder / 'base'}, " in told
    assert f"{run_folder / 'sft'}" in told
    assert main(["chat", "-m", "nowhere", "-q", "x"]) == 2
    assert "-m nowhere: holds no model. Name the folder of a stage, like results/sft." in capsys.readouterr().err
