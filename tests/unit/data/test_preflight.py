"""Bad text ends before any job is queued, with the file, the key and what would be right."""

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import command_settings, config
from nanochat.config_files import name_origin
from nanochat.data import corpus
from nanochat.data import preflight as module
from nanochat.data.corpus_files import Corpus
from nanochat.data.preflight import preflight
from nanochat.data.token_shards import build
from nanochat.data.tokenizer import Tokenizer
from nanochat.data.train_tokenizer import learn, sample
from nanochat.errors import UserError


def settings(*paths, vocab_size=300, sequence_length=16, tokens_per_step=64, fraction=0.2, **changes):
    source = {"source": "directory", "paths": [str(path) for path in paths]} if paths else {"source": "bundled"}
    return config.Config(
        corpus=config.Corpus(**source, validation_fraction=fraction, **changes),
        tokenizer=config.Tokenizer(vocab_size=vocab_size),
        train=config.Train(base=config.Base(sequence_length=sequence_length, tokens_per_step=tokens_per_step)),
    )


@pytest.fixture
def folder(tmp_path):
    lines = [f"Document {i} tells of the year {1790 + i} and of what was done in it." for i in range(100)]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def test_good_text_passes(folder):
    preflight(settings(folder))


def test_the_bundled_corpus_passes_in_well_under_a_second():
    started = time.monotonic()
    preflight(settings(vocab_size=4096, sequence_length=512, tokens_per_step=16_384, fraction=0.05))
    assert time.monotonic() - started < 1.5


def test_it_needs_no_torch():
    code = "import sys, nanochat.data.preflight; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere"], r"corpus\.paths = '.*nowhere': no such file or folder"),
        (["empty"], r"corpus\.paths = '.*empty': the folder is empty"),
    ],
)
def test_missing_and_empty_folders(tmp_path, paths, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        preflight(settings(*(tmp_path / path for path in paths)))


def test_no_text_column(folder):
    pq.write_table(pa.table({"body": ["a"]}), folder / "z.parquet")
    with pytest.raises(UserError, match=r"z\.parquet: corpus\.text_column = 'text': no such column. It has: body"):
        preflight(settings(folder))


def test_every_parquet_is_opened(folder):
    for i in range(20):
        pq.write_table(pa.table({"text": [f"text {i}"]}), folder / f"p{i:02}.parquet")
    path = folder / "p19.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"p19\.parquet: not a readable parquet file"):
        preflight(settings(folder))


def test_text_that_is_not_utf8_is_found_anywhere_in_small_files(folder):
    (folder / "z.txt").write_bytes(b"plain text\n" * 100_000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"z\.txt: not UTF-8: byte 0xe9 at offset 1,100,003"):
        preflight(settings(folder))


def test_of_big_files_samples_are_read(folder, monkeypatch):
    monkeypatch.setattr(module, "SCAN_BYTES", 1000)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 500)
    (folder / "z.txt").write_bytes(b"caf\xe9\n" + b"plain text\n" * 100_000)
    with pytest.raises(UserError, match=r"z\.txt: not UTF-8: byte 0xe9 at offset 3"):
        preflight(settings(folder))


def test_a_vocabulary_that_the_text_cannot_give_and_the_number_is_exact(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"tokenizer\.vocab_size = 5000: the training text gives ([\d,]+) entries"
    ) as caught:
        preflight(settings(folder, vocab_size=5000))
    achievable = int(str(caught.value).split("Give ")[1].split()[0])
    good = settings(folder, vocab_size=achievable)
    preflight(good)
    # The stage agrees.
    corpus.build(command_settings.CorpusSettings(seed=good.seed, corpus=good.corpus), tmp_path / "corpus")
    opened = Corpus.open(tmp_path / "corpus")
    with pytest.raises(UserError, match=rf"gives {achievable:,} entries"):
        learn(sample(opened, 10**9), achievable + 1)


def test_too_small_for_one_validation_row(folder):
    with pytest.raises(
        UserError, match=r"validation_fraction = 0\.2: holds out \d+ documents of at most [\d,]+ tokens, .*= 4,097"
    ):
        preflight(settings(folder, sequence_length=4096, tokens_per_step=4096))


def test_too_small_for_one_training_step(folder):
    with pytest.raises(UserError, match=r"tokens_per_step = 100000: the text gives only [\d,]+ tokens"):
        preflight(settings(folder, tokens_per_step=100_000))


def test_its_verdict_on_the_validation_row_is_the_stages(folder, tmp_path):
    """The longest row that passes is the longest that the encoded validation split holds."""
    good = settings(folder)
    corpus.build(command_settings.CorpusSettings(seed=good.seed, corpus=good.corpus), tmp_path / "corpus")
    opened = Corpus.open(tmp_path / "corpus")
    Tokenizer(learn(sample(opened, 10**9), 300), opened.sha256).save(tmp_path / "tokenizer")
    tokens = build(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens")["validation_tokens"]
    preflight(settings(folder, sequence_length=tokens - 1))
    with pytest.raises(UserError, match="one validation row"):
        preflight(settings(folder, sequence_length=tokens))


def test_white_space_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n \n")
    with pytest.raises(UserError, match=r"holds no text. Give at least two documents"):
        preflight(settings(tmp_path))


def test_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One document only.")
    with pytest.raises(UserError, match=r"of 1 documents that leaves no text to train on"):
        preflight(settings(tmp_path))


def test_conversations_of_ones_own_are_read_too(folder, tmp_path):
    path = tmp_path / "chats.json-lines"
    path.write_text('[{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi?"}]\n')
    mixture = [config.Source(name="jsonl", path=str(path))]
    good = settings(folder)
    bad = good.model_copy(update={"train": good.train.model_copy(update={"sft": config.Sft(mixture=mixture)})})
    with pytest.raises(UserError, match=r"line 1: message 2 is of role 'user' where 'assistant' must follow"):
        preflight(bad)


def test_a_message_about_a_setting_begins_with_it_so_that_its_file_can_be_named(folder):
    for bad in (
        settings(folder, vocab_size=5000),
        settings(folder, sequence_length=4096, tokens_per_step=4096),
        settings(folder, tokens_per_step=100_000),
        settings(folder / "nowhere"),
    ):
        with pytest.raises(UserError) as caught:
            preflight(bad)
        assert name_origin(str(caught.value), []) != str(caught.value)
        assert "\n" not in str(caught.value)


def test_huggingface_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    preflight(config.Config(corpus=config.Corpus(source="huggingface")))


def test_real_parquet_folder_passes_at_full_size(data_folder):
    started = time.monotonic()
    preflight(
        settings(
            data_folder / "corpus",
            vocab_size=32_768,
            sequence_length=2048,
            tokens_per_step=524_288,
            fraction=0.01,
        )
    )
    assert time.monotonic() - started < 10
