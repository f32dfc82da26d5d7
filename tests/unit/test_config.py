"""Settings: one definition, errors that name file, key and value, one file a stage."""

import json
import os
import tomllib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nanochat.command_settings import stage_settings
from nanochat.config import Base, Config, Model
from nanochat.config_files import (
    load,
    load_files,
    render_yaml,
    require_writable,
    write_run_settings,
    write_stage_settings,
)
from nanochat.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def error_of(tmp_path, text):
    """What a user reads who overlays config.yaml with `text`."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(text)
    with pytest.raises(UserError) as caught:
        load_files([REPOSITORY / "config.yaml", overlay])
    message = str(caught.value)
    assert message.startswith(str(overlay)), message
    return message.removeprefix(f"{overlay}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {depht: 4}", "model.depht: no such setting. Did you mean model.depth?"),
        ("sequence_length: 4", "sequence_length: no such setting. Did you mean train.base.sequence_length?"),
        ("model: {depth: four}", "model.depth = four: not a whole number."),
        ("model: {depth: 2.5}", "model.depth = 2.5: not a whole number."),
        ("model: {depth: 0}", "model.depth = 0: must be more than 0."),
        ("train: {base: {sequence_length: -8}}", "train.base.sequence_length = -8: must be at least 16."),
        ("corpus: 3", "corpus = 3: not a section of keys."),
        ("corpus: {source: bundeld}", "corpus.source = bundeld: must be 'bundled', 'directory' or 'huggingface'."),
        (
            "train: {optimizer: {matrix_learning_rate: 1e-3}}",
            "train.optimizer.matrix_learning_rate = 1e-3: not a number. YAML reads 1e-3 as text: write 0.001 or 1.0e-3.",
        ),
        (
            "train: {base: {gpus: 2, nodes: 4}}",
            "train.base.gpus = 2: not the same number on each of 4 nodes. Nearest: 4.",
        ),
        ("model: {width: 100, heads: 7}", "model.heads = 7: does not divide the width 100. Nearest that does: 5."),
        ("model: {width: 64, heads: 4, kv_heads: 3}", "model.kv_heads = 3: does not divide the 4 heads."),
        (
            "train: {base: {tokens_per_step: 500000}}",
            "train.base.tokens_per_step = 500000: not a multiple of sequence_length x GPUs = 2048 x 4 = 8192,"
            " so no batch size divides it. Nearest: 499712, 507904.",
        ),
        (
            "train: {base: {device_batch_size: 7}}",
            "train.base.device_batch_size = 7: does not divide the 64 rows that a step has on each device. Nearest: 4, 8.",
        ),
        (
            "corpus: {source: directory}",
            "corpus.source = directory: needs a file, a folder or a glob in corpus.paths.",
        ),
        (
            "train: {sft: {mixture: [{name: jsonl, path: nowhere.jsonl}]}}",
            "train.sft.mixture.0.path = nowhere.jsonl: no such file.",
        ),
    ],
)
def test_a_bad_setting_is_named_with_file_key_value_and_remedy(tmp_path, text, expected):
    assert error_of(tmp_path, text) == expected


def test_every_bad_setting_is_named_at_once(tmp_path):
    message = error_of(tmp_path, "model: {depth: x, head_dim: 3}\nseed: -1")
    assert len(message.splitlines()) == 3


def test_the_file_that_set_the_value_is_named_not_the_one_below_it(tmp_path):
    lower, upper = tmp_path / "lower.yaml", tmp_path / "upper.yaml"
    lower.write_text("model: {depth: 4}\nseed: 1")
    upper.write_text("model: {depth: -4}")
    with pytest.raises(UserError, match=r"upper\.yaml: model\.depth"):
        load_files([lower, upper])
    with pytest.raises(UserError, match=r"lower\.yaml: seed"):
        load({"model": {"depth": 4}, "seed": -1}, [lower, upper])


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path):
    """As when an example of the README is added at the end: YAML would drop the first section."""
    message = error_of(tmp_path, "corpus: {source: bundled}\nseed: 1\ncorpus: {shard_bytes: 5}\n")
    assert message.startswith("not valid YAML: the key corpus stands there twice, line 3, column 1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 18446744073709551616", "seed = 18446744073709551616: must be less than 4294967296."),
        ("train: {base: {learning_rate_scale: .inf}}", "train.base.learning_rate_scale = .inf: must be finite."),
        ("results: out/", "results = out/: write out."),
        ("results: my results", "results = my results: no spaces and no characters that a shell takes for its own."),
        (
            "corpus: {source: bundled, paths: [notes/]}",
            "corpus.paths = [notes/]: not read while corpus.source = bundled",
        ),
    ],
)
def test_values_that_would_fail_after_queueing_are_refused_before(tmp_path, text, says):
    assert error_of(tmp_path, text).startswith(says)


def test_a_home_folder_is_written_in_full(tmp_path, monkeypatch):
    """A shell would expand it and Snakemake would not: it made a folder of that name."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert error_of(tmp_path, "results: ~/runs") == "results = ~/runs: write the whole path: /home/somebody/runs."


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_files([bad])
    bad.write_text("[a, b]: 1")  # a list as a key
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML"):
        load_files([bad])


def test_config_yaml_explains_every_key_and_holds_the_defaults():
    assert (REPOSITORY / "config.yaml").read_text() == render_yaml(Config())


def test_rendered_settings_read_back_the_same():
    config = load_files([REPOSITORY / "config.yaml", REPOSITORY / "profiles/local/settings.yaml"])
    assert load(yaml.safe_load(render_yaml(config))) == config


def test_schema_is_in_step_with_the_settings():
    schema = json.loads((REPOSITORY / "workflow/schemas/config.schema.json").read_text())
    assert schema == Config.model_json_schema(), "nanochat schema > workflow/schemas/config.schema.json"


@pytest.mark.parametrize("profile", ["local", "workstation", "artemis"])
def test_every_profile_overlays_config_yaml(profile):
    folder = REPOSITORY / "profiles" / profile
    keys = yaml.safe_load((folder / "config.yaml").read_text())
    overlay = keys.get("configfile")
    load_files([REPOSITORY / "config.yaml", *([REPOSITORY / overlay] if overlay else [])])


def test_stage_settings_are_rewritten_only_when_they_change(tmp_path):
    config = Config()
    write_stage_settings(config, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    sft = config.train.sft.model_copy(update={"epochs": 2.0})
    changed = config.model_copy(update={"train": config.train.model_copy(update={"sft": sft})})
    write_stage_settings(changed, tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {"sft.json"}
    (tmp_path / "mid.json").unlink()
    assert write_stage_settings(config, tmp_path, keep=True) == ["sft"]
    assert (tmp_path / "sft.json").stat().st_mtime_ns == after["sft.json"]
    assert (tmp_path / "mid.json").exists()


def test_a_bare_on_or_off_means_what_it_says(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  compile: off\n")
    assert load_files([tmp_path / "a.yaml"]).train.compile == "off"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train": {"sft": {"mixture": [{"name": "identity", "path": "chats.jsonl"}]}}},
            "reads no file. Your own file is `name: jsonl`",
        ),
        ({"train": {"sft": {"steps": 3}}}, r"train\.sft\.steps: no such setting\. Known here: .*epochs"),
        ({"model": {"steps": 3}}, r"Did you mean train\.base\.steps\?"),
        ({"corpus": {"paths": None}}, r"corpus\.paths = \(empty\): not a list"),
        ({"benchmark": {"new_tokens": 20_000}}, r"new_tokens = 20000: .* 16384 positions"),
    ],
)
def test_an_error_says_what_would_be_right(values, words):
    with pytest.raises(UserError, match=words):
        load(values)


def test_a_neutral_setting_is_written_and_makes_no_stage_run_again(tmp_path):
    """Snakemake goes by the mtime: what is finished stays, what is not reads the new value."""
    write_stage_settings(load({}), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    how = {"train": {"trackers": ["tensorboard"], "base": {"keep_checkpoints": 7}}, "tokens": {"workers": 3}}
    write_stage_settings(load(how | {"benchmark": {"names": ["training"]}}), tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before
    assert json.loads((tmp_path / "base.json").read_text())["train"]["keep_checkpoints"] == 7
    assert json.loads((tmp_path / "benchmark.json").read_text())["benchmark"]["names"] == ["training"]
    write_stage_settings(load(how | {"benchmark": {"steps": 3}}), tmp_path)
    assert (tmp_path / "benchmark.json").stat().st_mtime_ns > before["benchmark.json"]


def test_keys_that_the_source_of_the_text_does_not_read_make_nothing_run_again(tmp_path):
    bundled = {"source": "bundled"}
    write_stage_settings(load({"corpus": bundled}), tmp_path)
    before = (tmp_path / "corpus.json").stat().st_mtime_ns
    write_stage_settings(load({"corpus": bundled | {"pattern": "other.parquet"}}), tmp_path)
    assert (tmp_path / "corpus.json").stat().st_mtime_ns == before
    write_stage_settings(load({"corpus": {"source": "huggingface", "pattern": "other.parquet"}}), tmp_path)
    changed = (tmp_path / "corpus.json").stat().st_mtime_ns
    assert changed > before
    write_stage_settings(load({"corpus": {"source": "huggingface", "pattern": "more.parquet"}}), tmp_path)
    assert (tmp_path / "corpus.json").stat().st_mtime_ns > changed


def test_a_dry_run_of_other_settings_leaves_no_trace(tmp_path):
    def mtime(values, dry_run=False):
        write_stage_settings(load(values), tmp_path, dry_run=dry_run)
        return (tmp_path / "base.json").stat().st_mtime_ns

    longer, neutral = {"train": {"base": {"steps": 7}}}, {"train": {"base": {"keep_checkpoints": 7}}}
    ran = mtime({})
    assert mtime(longer, dry_run=True) > ran
    assert mtime({}, dry_run=True) == mtime(neutral, dry_run=True) == ran
    assert mtime(longer, dry_run=True) > ran
    assert mtime(neutral) == ran
    again = mtime(longer)
    assert again > ran
    assert mtime({}, dry_run=True) > again, "what the last real run made is of other settings"
    assert mtime(longer) == again


def test_what_stands_there_of_another_version_counts_as_changed(tmp_path):
    for text in ("{}", "no JSON", '{"tokens": {"workers": 0, "a_key_that_was": 1}}'):
        (tmp_path / "tokens.json").write_text(text)
        os.utime(tmp_path / "tokens.json", ns=(1, 1))
        write_stage_settings(load({}), tmp_path)
        assert (tmp_path / "tokens.json").stat().st_mtime_ns > 1


def test_neutral_settings_are_settings():
    """pydantic takes no offence at a name to leave out that is not there."""

    def names(neutral, content):
        for name in neutral:
            assert name in content, name
            if isinstance(neutral, dict) and neutral[name] is not True:
                names(neutral[name], content[name])

    for settings in stage_settings(Config()).values():
        names(settings.neutral, settings.model_dump())


def test_the_settings_of_a_run_are_all_of_them(tmp_path):
    config = load({"seed": 3, "train": {"sft": {"epochs": 2.0, "device_batch_size": None}}, "results": "here"})
    path = write_run_settings(config, tmp_path)
    assert load_files([path]) == config
    assert write_run_settings(config, tmp_path) == path
    assert write_run_settings(load({}), tmp_path) != path


def test_every_stage_has_the_window_of_the_base_model():
    chat, base = {"sequence_length": 4096}, {"sequence_length": 1024}
    every = stage_settings(load({"train": {"base": base, "mid": chat, "sft": chat}}))
    assert {settings.model.window for settings in every.values() if hasattr(settings, "model")} == {256}


def test_a_window_may_be_set_and_is_none_without_windows():
    assert load({"model": {"window": 100}}).model.resolved(1024).window == 100
    assert load({"model": {"additions": ["smear"]}}).model.resolved(1024).window is None
    with pytest.raises(UserError, match=r"model\.window = 100: has no effect unless"):
        load({"model": {"additions": ["smear"], "window": 100}})


def test_stage_settings_survive_the_file(tmp_path):
    for name, settings in stage_settings(Config()).items():
        again = type(settings).model_validate_json(settings.model_dump_json())
        assert again.model_dump() == settings.model_dump(), name


@given(depth=st.integers(1, 64), head_dim=st.sampled_from([32, 64, 128]))
def test_one_dial_gives_whole_heads(depth, head_dim):
    model = Model(depth=depth, head_dim=head_dim).resolved()
    assert model.width >= depth * model.aspect_ratio
    assert model.width % model.heads == 0
    assert model.width // model.heads == head_dim
    assert model.heads % model.kv_heads == 0


@given(rows=st.integers(1, 1000), length=st.integers(16, 4096), gpus=st.integers(0, 8))
def test_any_multiple_of_rows_is_a_step(rows, length, gpus):
    base = Base(sequence_length=length, gpus=gpus, tokens_per_step=rows * length * max(1, gpus))
    load({"train": {"base": base.model_dump()}, "benchmark": {"prompt_tokens": 8, "new_tokens": 8}})


def test_a_results_folder_that_is_not_writable_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"results = .*is a file"):
        require_writable(tmp_path / "file" / "results")


def test_environment_yml_installs_from_pyproject():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    python, _, pip = environment["dependencies"]
    assert pip == {"pip": ["-e ."]}, "pyproject.toml is the one list of dependencies"
    lower = project["requires-python"].split(",")[0].removeprefix(">=")
    assert python == f"python={lower}"
    assert environment["name"] == project["name"]
