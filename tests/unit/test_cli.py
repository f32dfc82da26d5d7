"""One command line: each stage says what it reads and writes, a user's error is one line and exit code 2."""

import os
import subprocess
import sys

import pytest

from nanochat import cli

STAGES = [
    "corpus",
    "tokenizer",
    "tokens",
    "conversations",
    "batch_size",
    "base",
    "mid",
    "sft",
    "evaluate",
    "benchmark",
    "report",
]


def nanochat(*arguments, **environment):
    command = [sys.executable, "-m", "nanochat", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_what_a_stage_reads_and_writes(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([stage, "--help"])
    assert ended.value.code == 0
    page = capsys.readouterr().out
    assert "Reads" in page
    assert "Writes" in page
    for option in {"report": ["--results"], "batch_size": ["--config", "--out"]}.get(stage, ["--out"]):
        assert option in page


def test_every_command_is_listed_without_importing_torch():
    listing = nanochat("--help")
    assert listing.returncode == 0
    for command in [*cli.COMMANDS, *cli.CLUSTER_COMMANDS]:
        assert command in listing.stdout
    program = "import sys, nanochat.report.build, nanochat.check, nanochat.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_users_error_is_one_line_and_exit_code_2(tmp_path):
    ended = nanochat("corpus", "--config", str(tmp_path / "none.json"), "--out", str(tmp_path))
    assert ended.returncode == 2
    assert (
        ended.stderr.strip()
        == f"nanochat corpus: {tmp_path}/none.json: no such file. Has the stage that writes it run?"
    )


def test_the_rooms_import_downwards_only():
    """cli / evaluate, benchmark / train, infer / data, model, report / config, hardware / files; slurm knows no nanochat."""
    import ast
    from pathlib import Path

    floors = [
        {"files", "errors", "progress", "version"},
        {"config", "command_settings", "config_files", "hardware", "settings"},
        {"data", "model", "report"},
        {"train", "infer"},
        {"evaluate", "benchmark", "check"},
        {"cli", "__main__"},
    ]
    floor = {room: level for level, rooms in enumerate(floors) for room in rooms}
    package = Path(cli.__file__).parent
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "nanochat":
                names = [f"nanochat.{alias.name}" for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != "nanochat" or len(parts) < 2 or parts[1] not in floor or parts[1] == room:
                    continue
                assert floor[parts[1]] <= floor[room], f"{path}: imports {name}, which stands above it"
                sideways = {room, parts[1]} in (
                    {"train", "infer"},
                    {"data", "model"},
                    {"report", "data"},
                    {"report", "model"},
                )
                allowed = room == "train" and parts[1] == "train"
                assert not sideways or allowed, f"{path}: imports {name}, which stands beside it"
    for path in (package.parent / "slurm").rglob("*.py"):
        assert "nanochat." not in "".join(
            line for line in path.read_text().splitlines() if line.startswith(("import", "from"))
        )
