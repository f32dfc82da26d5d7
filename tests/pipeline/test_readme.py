"""What the README shows is true: its commands run, its settings load, its error is what a user would read."""

import json
import re
import shlex
from pathlib import Path

import pytest

from nanochat.config_files import load_files
from nanochat.errors import UserError
from nanochat.report.render import render

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in commands() if line.startswith("snakemake --profile profiles/local")]
)
def test_snakemake_commands_are_accepted(fresh_checkout, command):
    words = shlex.split(command)
    if "--report" in words:
        words = words[: words.index("--report")]  # needs a finished run; test_pipeline has one
    fresh_checkout.run(*words, *(["-n"] if "-n" not in words else []))


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [line.split()[1] for line in commands() if line.startswith("make ")]
    assert {"run", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_load(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/chats.jsonl").write_text('[{"role": "user", "content": "Hello"}]\n')
    (tmp_path / "overlay.yaml").write_text(block)
    load_files([REPOSITORY / "config.yaml", tmp_path / "overlay.yaml"])


def test_the_error_shown_is_the_error_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {depht: 4}")
    with pytest.raises(UserError) as caught:
        load_files(["config.yaml"])
    assert str(caught.value) in README


def test_every_file_named_exists():
    for name in re.findall(r"`((?:profiles|docs|workflow|tests|slurm|nanochat)/[\w/.-]*)`", README):
        assert (REPOSITORY / name).exists(), name


def test_the_example_run_is_a_report_as_this_code_writes_it_of_settings_that_it_takes():
    """After a change of the template: write what `render` makes of the example's report.json to its report.md."""
    example = REPOSITORY / "docs/example-h100"
    page = (example / "report.md").read_text()
    assert render(json.loads((example / "report.json").read_text())) == page
    for figure in re.findall(r"]\((figures/\w+\.png)\)", page):
        assert (example / figure).is_file()
    load_files([str(REPOSITORY / "config.yaml"), str(example / "settings.yaml")])
