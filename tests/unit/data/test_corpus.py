"""Shards, the held-out split, interruption, and where the text comes from."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import command_settings, config
from nanochat.data import corpus, corpus_files
from nanochat.data.corpus_files import Corpus
from nanochat.errors import UserError


def texts(folder, split):
    return [document.text for document in Corpus.open(folder).documents(split)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def test_bundled_corpus_is_the_249_messages_with_their_metadata(tmp_path):
    settings = config.Corpus(source="bundled", validation_fraction=0.05)
    corpus.build(command_settings.CorpusSettings(seed=1337, corpus=settings), tmp_path)
    opened = Corpus.open(tmp_path)
    documents = [d for split in ("train", "validation") for d in opened.documents(split)]
    assert len(documents) == opened.manifest["documents"] == 249
    assert opened.manifest["text_bytes"] == sum(len(d.text.encode()) for d in documents) > 12_000_000
    lincoln = next(d for d in documents if d.metadata["date"] == "1862-12-01")
    assert lincoln.metadata["president"] == "Abraham Lincoln"
    assert lincoln.metadata["title"] == "Annual message of 1862 by Abraham Lincoln"
    assert {d.kind for d in documents} == {"sotu"}


def test_no_training_shard_holds_a_validation_document(corpus_folder):
    train, validation = texts(corpus_folder, "train"), texts(corpus_folder, "validation")
    assert validation
    assert not set(train) & set(validation)


def test_copies_of_a_text_fall_on_one_side(tmp_path, directory_settings):
    documents = [f"text number {i % 50}" for i in range(500)]
    write_jsonl(tmp_path / "a.jsonl", documents)
    corpus.build(directory_settings(tmp_path / "a.jsonl"), tmp_path / "out")
    train, validation = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(documents)
    assert validation
    assert not set(train) & set(validation)


@given(st.text(), st.integers(0, 2**63))
def test_share_depends_on_text_and_seed_only(text, seed):
    assert 0 <= corpus.share_of(text, seed) == corpus.share_of(text, seed) < 1


def test_held_out_share_is_the_fraction():
    below = sum(corpus.share_of(f"document {i}", 7) < 0.1 for i in range(20_000))
    assert 1800 < below < 2200


def test_shards_are_bounded_and_listed_with_their_sums(corpus_folder):
    opened = Corpus.open(corpus_folder)
    assert len(opened.split("train")) > 2
    for shard in opened.shards:
        documents = list(opened.shard_documents(shard))  # compares size and sha256
        assert shard.documents == len(documents)
        assert shard.text_bytes == sum(len(d.text.encode()) for d in documents)
        assert shard.text_bytes <= 1_500_000 or shard.documents == 1


def test_max_bytes_is_a_bound_that_is_nearly_reached(corpus_folder):
    total = sum(shard.text_bytes for shard in Corpus.open(corpus_folder).shards)
    assert 4_800_000 < total <= 5_000_000


def test_the_same_settings_give_the_same_manifest(tmp_path, corpus_folder):
    settings = config.Corpus(source="bundled", validation_fraction=0.05, shard_bytes=1_500_000, max_bytes=5_000_000)
    corpus.build(command_settings.CorpusSettings(seed=1, corpus=settings), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (corpus_folder / "manifest.json").read_bytes()


def test_worker_processes_do_not_change_a_byte(tmp_path, directory_settings, monkeypatch):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} " * 20 for i in range(100)])
    settings = directory_settings(tmp_path / "*.jsonl", shard_bytes=9_000)
    corpus.build(settings, tmp_path / "one")
    monkeypatch.setattr(corpus, "SERIAL_BYTES", 0)
    monkeypatch.setattr(corpus, "cpus", lambda: 2)
    corpus.build(settings, tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_an_interrupted_run_does_not_repeat_what_is_done(tmp_path, directory_settings):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i} " * 20 for i in range(100)])
    settings = directory_settings(tmp_path / "*.jsonl", shard_bytes=9_000)
    good = (tmp_path / "c.jsonl").read_bytes()
    corpus.build(settings, tmp_path / "straight")
    # The key holds sizes and times: the damaged file must look the same, as after a disk error that went away.
    stat = (tmp_path / "c.jsonl").stat()
    (tmp_path / "c.jsonl").write_bytes(good[:-30] + b"\xff" * 30)
    _set_times(tmp_path / "c.jsonl", stat)
    with pytest.raises(UserError, match="not UTF-8"):
        corpus.build(settings, tmp_path / "out")
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/.progress").glob("train-*.parquet")}
    assert records
    (tmp_path / "c.jsonl").write_bytes(good)
    _set_times(tmp_path / "c.jsonl", stat)
    corpus.build(settings, tmp_path / "out")
    published = {path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.parquet")}
    assert set(records.values()) <= published
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "straight/manifest.json").read_bytes()


def test_a_complete_corpus_is_left_alone_and_a_lost_manifest_comes_back(tmp_path, directory_settings):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    settings = directory_settings(tmp_path / "a.jsonl")
    corpus.build(settings, tmp_path / "out")
    shard = tmp_path / "out/train-00000.parquet"
    before, manifest = shard.stat().st_mtime_ns, (tmp_path / "out/manifest.json").read_bytes()
    (tmp_path / "out/manifest.json").unlink()  # as Snakemake does before it runs a rule again
    corpus.build(settings, tmp_path / "out")
    assert shard.stat().st_mtime_ns == before
    assert (tmp_path / "out/manifest.json").read_bytes() == manifest


def test_a_damaged_shard_is_made_again_by_the_stage(tmp_path, directory_settings):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    settings = directory_settings(tmp_path / "a.jsonl")
    corpus.build(settings, tmp_path / "out")
    shard = tmp_path / "out/train-00000.parquet"
    good = shard.read_bytes()
    shard.write_bytes(bytes([*good[:200], good[200] ^ 1, *good[201:]]))
    corpus.build(settings, tmp_path / "out")
    assert shard.read_bytes() == good


def test_other_settings_leave_no_shard_of_the_earlier_ones(tmp_path, directory_settings):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i} " * 50 for i in range(200)])
    corpus.build(directory_settings(tmp_path / "a.jsonl", shard_bytes=5_000), tmp_path / "out")
    corpus.build(directory_settings(tmp_path / "a.jsonl"), tmp_path / "out")
    listed = {shard.file for shard in Corpus.open(tmp_path / "out").shards}
    assert {path.name for path in (tmp_path / "out").glob("*.parquet")} == listed


def test_three_kinds_of_files_give_their_documents(tmp_path, directory_settings):
    folder = tmp_path / "letters"
    (folder / "sub").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["parquet one", None, "  "], "title": ["A", "B", "C"]}), folder / "p.parquet")
    write_jsonl(folder / "j_001.jsonl", ["json one", "json two"])
    (folder / "sub/t.txt").write_bytes("\ufeffplain\r\ntext é\n".encode())
    corpus.build(directory_settings(folder), tmp_path / "out")
    documents = [d for split in ("train", "validation") for d in Corpus.open(tmp_path / "out").documents(split)]
    found = {d.text: (d.kind, d.metadata) for d in documents}
    assert found == {
        "parquet one": ("p", {"title": "A"}),
        "json one": ("j", {}),
        "json two": ("j", {}),
        "plain\ntext é": ("sub", {}),
    }


def test_a_few_documents_still_hold_one_out(tmp_path, directory_settings):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    corpus.build(directory_settings(tmp_path / "a.jsonl", validation_fraction=1e-9), tmp_path / "out")
    assert len(texts(tmp_path / "out", "validation")) == 1
    assert len(texts(tmp_path / "out", "train")) == 2


def test_one_document_cannot_be_split(tmp_path, directory_settings):
    write_jsonl(tmp_path / "a.jsonl", ["only this", "only this"])
    with pytest.raises(UserError, match=r"validation_fraction = 0\.2: of 2 documents that leaves no training text"):
        corpus.build(directory_settings(tmp_path / "a.jsonl"), tmp_path / "out")


def test_a_damaged_shard_is_found_when_it_is_read(tmp_path, corpus_folder):
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    path = tmp_path / "corpus/train-00001.parquet"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001\.parquet: its sha256 is not the one in .*manifest\.json"):
        list(Corpus.open(tmp_path / "corpus").documents("train"))
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"train-00001\.parquet: [\d,]+ bytes, .*manifest\.json says"):
        list(Corpus.open(tmp_path / "corpus").documents("train"))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        Corpus.open(tmp_path)


def test_real_books_as_a_directory_source(tmp_path, data_folder, directory_settings):
    settings = directory_settings(
        data_folder / "corpus/books_pd_0000[01].parquet",
        data_folder / "corpus/wiki_vital.parquet",
        shard_bytes=4_000_000,
        max_bytes=10_000_000,
        validation_fraction=0.05,
    )
    corpus.build(settings, tmp_path)
    opened = Corpus.open(tmp_path)
    train, validation = texts(tmp_path, "train"), texts(tmp_path, "validation")
    assert len(train) + len(validation) == opened.manifest["documents"] > 500
    assert not set(train) & set(validation)
    assert 9_500_000 < opened.manifest["text_bytes"] <= 10_000_000
    assert all(shard.text_bytes <= 4_000_000 for shard in opened.shards)
    assert next(opened.documents("train")).metadata.keys() >= {"title", "author", "year"}


def _set_times(path, stat):
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_excerpt_is_of_all_sources(tmp_path, directory_settings, monkeypatch):
    """They stand one after the other: the first documents of a shard are those of the first source."""
    monkeypatch.setattr(corpus_files, "ROW_GROUP_BYTES", 20_000)
    for name in "abcd":
        lines = [json.dumps({"text": f"{name} {i} " + "word " * 100}) for i in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    corpus.build(directory_settings(tmp_path, validation_fraction=0.05), tmp_path / "out")
    opened = Corpus.open(tmp_path / "out")
    found = list(opened.excerpt("train", 100_000))
    assert {document.text[0] for document in found} == set("abcd")
    assert 60_000 < sum(len(document.text) for document in found) < 200_000
    assert len(list(opened.excerpt("train", 10**9))) == sum(shard.documents for shard in opened.split("train"))


def test_files_that_nobody_reads_are_named(tmp_path, directory_settings, capfd):
    (tmp_path / "own/.cache").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl.gz", "C.JSONL", ".cache/d.bin"):
        (tmp_path / "own" / name).write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(100)))
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more/e.jsonl", ["one", "two"])
    (tmp_path / "more/notes.md").write_text("not read")
    corpus.build(directory_settings(tmp_path / "own", tmp_path / "more"), tmp_path / "out")
    said = capfd.readouterr().err
    assert "3 files" in said
    assert "C.JSONL" in said
    assert ".cache" not in said
