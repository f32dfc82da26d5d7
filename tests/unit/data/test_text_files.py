"""Every piece of a file gives its own documents, and what is wrong in a file is named with its place."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data import text_files
from nanochat.data.text_files import Piece, documents, expand, pieces_of
from nanochat.errors import UserError


def read(path, column="text"):
    return [d.text for piece in pieces_of(path, column) for d in documents(piece, column)]


@given(
    lines=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30), max_size=30
    ),
    cut=st.integers(1, 60),
)
def test_pieces_give_each_line_once_wherever_they_are_cut(tmp_path_factory, lines, cut):
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"x{line}"}, ensure_ascii=False) + "\n" for line in lines), newline="")
    size = path.stat().st_size
    pieces = [Piece(str(path), "a", start, min(start + cut, size), cut) for start in range(0, size, cut)]
    assert [d.text for piece in pieces for d in documents(piece, "text")] == [f"x{line}" for line in lines]


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "TXT_DOCUMENT_BYTES", 200)
    paragraphs = [f"Paragraph {i}: " + "word " * (i % 17) for i in range(100)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    found = read(path)
    assert len(found) > 10
    assert [p.strip() for text in found for p in text.split("\n\n")] == [p.strip() for p in paragraphs]


def test_plain_text_without_blank_lines_is_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "TXT_DOCUMENT_BYTES", 200)
    (tmp_path / "a.txt").write_text("one line after another\n" * 200)
    assert max(len(text) for text in read(tmp_path / "a.txt")) < 500


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"corpus\.paths = '.*/nowhere': no such file or folder"):
        expand([str(tmp_path / "nowhere")], "corpus.paths")


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.md").write_text("not text for training")
    with pytest.raises(UserError, match=r"the folder is empty or holds no file that ends in \.parquet, \.jsonl, \.txt"):
        expand([str(tmp_path)], "corpus.paths")


def test_glob_without_a_match_is_named(tmp_path):
    with pytest.raises(UserError, match=r"corpus\.paths = '.*\*\.parquet': matches no file"):
        expand([str(tmp_path / "*.parquet")], "corpus.paths")


def test_no_paths_at_all():
    with pytest.raises(UserError, match=r"corpus\.paths = \[\]: empty"):
        expand([], "corpus.paths")


def test_unknown_kind_of_file_is_named(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"a\.pdf': not a text file that can be read"):
        expand([str(tmp_path / "a.pdf")], "corpus.paths")


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert expand([str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "a.txt")], "p") == [tmp_path / "a.txt"]


def test_missing_column_is_named_with_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet: corpus\.text_column = 'text': no such column. It has: content, id"
    ):
        read(tmp_path / "a.parquet")


def test_column_that_is_no_text_is_named(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"text_column = 'text': holds int64, not text"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_string_types_are_text(tmp_path, kind):
    pq.write_table(pa.table({"nested": [[1], [2, 3]], "text": pa.array(["a", "b"]).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b"]


@pytest.mark.parametrize("keep", [0, 3, 500])
def test_truncated_parquet_is_named(tmp_path, keep):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(100)]}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"a\.parquet: not a readable parquet file, {keep} bytes"):
        read(path)


def test_damaged_pages_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(1000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[100:400] = b"\x00" * 300
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 cannot be read"):
        read(path)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: row group 0, after row 0: text that is not UTF-8 \(byte 0xff\)"):
        read(tmp_path / "a.parquet")


def test_plain_text_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes("first line\nécole\n".encode() + "école".encode("latin1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8: byte 0xe9 at offset 18"):
        read(tmp_path / "a.txt")


def test_text_in_utf16_without_a_mark_is_not_taken_for_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("first line\nsecond\n".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"a\.txt: null bytes at offset 1: not UTF-8.* iconv -f utf-16le"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"a null \0 in a line of text\n")
    assert len(read(tmp_path / "b.txt")) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at offset 30"),
        (b'{"text": "cut', "byte 17: this line is not JSON"),
        (
            b'{"body": "b", "id": 1}',
            r"byte 17: corpus\.text_column = 'text': this line has no such key. It has: body, id",
        ),
        (b'["text"]', "this line holds a list. Each line must be one JSON object"),
        (b'{"text": 5}', "key 'text' holds a int. It must be a string"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_in_a_json_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl")


def test_columns_of_one_name_are_named_or_left_out(tmp_path):
    path = tmp_path / "twice.parquet"
    for names, words in ((["text", "text"], "there are 2 columns of that name"), (["text", "title", "title"], None)):
        pq.write_table(pa.Table.from_arrays([pa.array(["one", "two"])] * len(names), names=names), path)
        if words:
            with pytest.raises(UserError, match=words):
                pieces_of(path, "text")
            continue
        (piece,) = pieces_of(path, "text")
        assert [(found.text, found.metadata) for found in documents(piece, "text")] == [("one", {}), ("two", {})]
