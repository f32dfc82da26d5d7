"""Files are written whole or not at all."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nanochat.command_settings import CorpusSettings
from nanochat.errors import UserError
from nanochat.files import (
    append_json_line,
    read_json,
    read_json_lines,
    read_settings,
    require_checksum,
    sha256,
    whole_file,
    write_json,
    write_text,
)


def test_a_failing_writer_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail_halfway():
        with whole_file(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    program = f"""
        from nanochat.files import write_text
        while True:
            for letter in "ab":
                write_text({str(path)!r}, letter * 1_000_000)
    """
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        content = path.read_text()
        assert content in ("a" * 1_000_000, "b" * 1_000_000)


def _append(path, writer):
    for number in range(200):
        append_json_line(path, {"writer": writer, "number": number, "padding": "x" * 300})


def test_writers_of_one_process_id_share_no_temporary_file(tmp_path):
    """In containers every job may be process 1; the folder is shared."""
    path = tmp_path / "file"
    with whole_file(path) as one, whole_file(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # which was left last
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_lines_of_two_writers_never_mix(tmp_path):
    path = tmp_path / "log.jsonl"
    writers = [multiprocessing.Process(target=_append, args=(path, writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = read_json_lines(path)
    assert sorted((line["writer"], line["number"]) for line in lines) == [(w, n) for w in range(2) for n in range(200)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_json_lines(path) == [{"step": 1}]
    append_json_line(path, {"step": 2})
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_missing_or_broken_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"plan\.json: no such file"):
        read_json(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"half":')
    with pytest.raises(UserError, match=r"plan\.json: not valid JSON"):
        read_json(tmp_path / "plan.json")
    write_json(tmp_path / "corpus.json", {"seed": "one"})
    with pytest.raises(UserError, match=r"corpus\.json: seed: .*CorpusSettings"):
        read_settings(tmp_path / "corpus.json", CorpusSettings)


def test_not_a_number_never_reaches_a_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "Written only in part"),
        (lambda path: path.write_bytes(b"y" * 1000), "its sha256 is not the one"),
        (lambda path: path.unlink(), "missing, but listed in"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    path = tmp_path / "shard.bin"
    path.write_bytes(b"x" * 1000)
    listed = (path.stat().st_size, sha256(path), "metrics.json")
    require_checksum(path, *listed)
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        require_checksum(path, *listed)
    assert "Remove metrics.json and run the workflow again" in str(caught.value)


def test_json_is_readable_by_a_person(tmp_path):
    write_json(tmp_path / "a.json", {"text": "Überzeugung", "list": [1]})
    content = (tmp_path / "a.json").read_text()
    assert "Überzeugung" in content
    assert content.endswith("}\n")
    assert json.loads(content) == {"text": "Überzeugung", "list": [1]}
