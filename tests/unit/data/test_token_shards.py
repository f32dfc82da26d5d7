"""Encoding is deterministic and resumable; damage is found and named."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cli import main
from nanochat.data import token_shards
from nanochat.data.corpus_files import Corpus
from nanochat.data.token_shards import TokenShards, build, dtype_of
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError


@pytest.fixture
def copied(tokens_folder, tmp_path):
    shutil.copytree(tokens_folder, tmp_path / "tokens")
    return tmp_path / "tokens"


def test_tokens_decode_to_the_corpus_document_by_document(corpus_folder, tokenizer, tokens_folder):
    for split in ("train", "validation"):
        shards = TokenShards.open(tokens_folder, split)
        starts = shards.documents()
        bounds = np.append(starts, shards.total_tokens)
        texts = [document.text for document in Corpus.open(corpus_folder).documents(split)]
        assert len(starts) == len(texts)
        assert shards.text_bytes == sum(len(text.encode()) for text in texts)
        for i, text in enumerate(texts):
            ids = shards.read(int(bounds[i]), int(bounds[i + 1] - bounds[i]))
            assert ids[0] == tokenizer.bos_id
            assert tokenizer.decode(ids[1:]) == text


@given(data=st.data())
def test_reads_across_shards_are_one_sequence(tokens_folder, data):
    shards = TokenShards.open(tokens_folder, "train", verify=False)
    whole = np.concatenate([np.fromfile(tokens_folder / shard.file, "<u2") for shard in shards.shards])
    bound = int(data.draw(st.sampled_from(shards.bounds.tolist())))
    start = max(0, min(bound + data.draw(st.integers(-5000, 5000)), len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    assert np.array_equal(shards.read(start, count), whole[start : start + count])


def test_two_processes_give_the_same_bytes(corpus_folder, tokenizer_folder, tokens_folder, tmp_path):
    build(corpus_folder, tokenizer_folder, tmp_path, workers=2)
    for path in [*tokens_folder.glob("*.bin"), *tokens_folder.glob("*.npy")]:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_is_done_is_not_done_again_unless_lost_or_damaged(corpus_folder, tokenizer_folder, copied):
    kept, lost, damaged = sorted(copied.glob("train-*.bin"))[:3]
    before, content, good = kept.stat().st_mtime_ns, lost.read_bytes(), damaged.read_bytes()
    lost.unlink()
    damaged.write_bytes(good[:-2] + bytes([good[-2] ^ 1, good[-1]]))
    (copied / "metrics.json").unlink()
    build(corpus_folder, tokenizer_folder, copied, workers=1)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    assert damaged.read_bytes() == good
    TokenShards.open(copied, "train")


def test_another_tokenizer_encodes_everything_again(corpus_folder, tokenizer, copied, tmp_path):
    other = Tokenizer(tokenizer.merges[:500], tokenizer.corpus_sha256)
    other.save(tmp_path / "tokenizer")
    metrics = build(corpus_folder, tmp_path / "tokenizer", copied, workers=1)
    assert metrics["vocab_size"] == other.vocab_size
    assert TokenShards.open(copied, "train").read(0, 1000).max() < other.vocab_size


def test_a_truncated_shard_is_named(copied):
    path = copied / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        UserError, match=r"train-00000\.bin: [\d,]+ bytes, .*metrics\.json says [\d,]+\. Written only in part\?"
    ):
        TokenShards.open(copied, "train")


def test_a_missing_shard_is_named(copied):
    (copied / "validation-00000.bin").unlink()
    with pytest.raises(UserError, match=r"validation-00000\.bin: missing, but listed in"):
        TokenShards.open(copied, "validation")


@pytest.mark.parametrize("big", [False, True])
def test_a_flipped_bit_is_named_also_where_checksums_run_beside_the_reading(copied, big, monkeypatch):
    path = copied / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)
    if not big:
        with pytest.raises(UserError, match=r"train-00001\.bin: its sha256 is not the one in"):
            TokenShards.open(copied, "train")
        return
    monkeypatch.setattr(token_shards, "VERIFY_FIRST_BYTES", 0)
    shards = TokenShards.open(copied, "train")
    shards.checking.join()
    with pytest.raises(UserError, match=r"train-00001\.bin: its sha256 is not the one in"):
        shards.read(0, 10)
    shards = TokenShards.open(copied, "train", verify=False)
    shards.read(0, 10)


def test_a_list_with_other_numbers_of_tokens_is_named(copied):
    metrics = json.loads((copied / "metrics.json").read_text())
    metrics["shards"][0]["tokens"] -= 1
    (copied / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(
        UserError, match=r"metrics\.json: train-00000\.bin has [\d,]+ tokens in [\d,]+ bytes, which is not"
    ):
        TokenShards.open(copied, "train")


def test_a_tokenizer_of_another_run_is_named(corpus_folder, tokenizer, tmp_path):
    Tokenizer(tokenizer.merges, "0" * 64).save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: belongs to another run: .* 000000000000"):
        build(corpus_folder, tmp_path, tmp_path / "out")


def test_two_bytes_a_token_up_to_65536_entries():
    assert dtype_of(65_536) == np.uint16
    assert dtype_of(65_537) == np.uint32


def test_a_vocabulary_over_65536_is_stored_in_four_bytes(corpus_folder, tokenizer, tmp_path):
    # Entries that no text gives: only their number counts here.
    extra = [bytes([255, 254]) + i.to_bytes(3, "big") for i in range(65_536)]
    big = Tokenizer([*tokenizer.merges, *extra], tokenizer.corpus_sha256)
    big.save(tmp_path / "tokenizer")
    build(corpus_folder, tmp_path / "tokenizer", tmp_path / "out", workers=1)
    shards = TokenShards.open(tmp_path / "out", "validation")
    assert shards.dtype == np.uint32
    assert shards.read(0, 1)[0] == big.bos_id > 65_535


def test_the_command_writes_the_contracts_metrics(tmp_path, corpus_folder, tokenizer_folder):
    (tmp_path / "tokens.json").write_text('{"tokens": {"workers": 1}}')
    arguments = ["--config", str(tmp_path / "tokens.json"), "--corpus", str(corpus_folder)]
    assert main(["tokens", *arguments, "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["train_tokens"] == TokenShards.open(tmp_path / "out", "train").total_tokens
    assert metrics["tokenizer_sha256"] == Tokenizer.load(tokenizer_folder).sha256
    assert metrics["dtype"] == "uint16"
