"""Any text round-trips, text is never a special token, and a tokenizer that was changed is found."""

import json
import socket

import pytest
import tiktoken
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.cli import main
from nanochat.data import corpus, train_tokenizer
from nanochat.data.corpus_files import Corpus
from nanochat.data.tokenizer import LONGEST_SPACE, PATTERN, SPECIAL_TOKENS, Tokenizer, segments
from nanochat.data.train_tokenizer import learn, measure, sample
from nanochat.errors import UserError

BYTES = Tokenizer([bytes([i]) for i in range(256)])
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
special_looking = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", "<|endoftext|>", " "])).map("".join)


@given(st.one_of(unicode_text, special_looking))
@example("<|bos|>")
@example(" \u2003\x85\x1c\r\n\x00\U0001f9d1\u200d\U0001f680e\u0301")
def test_any_text_round_trips_and_stays_ordinary(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= token < tokenizer.bos_id for token in ids)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


@given(st.text(st.sampled_from("a \n"), max_size=40), st.integers(3, 6))
def test_segments_lose_nothing_and_cut_in_white_space_only(text, longest):
    from nanochat.data import tokenizer as module

    saved, module.LONGEST_SPACE = module.LONGEST_SPACE, longest
    try:
        parts = list(segments(text))
    finally:
        module.LONGEST_SPACE = saved
    assert "".join(parts) == text
    assert all(part[-longest:].isspace() for part in parts[:-1])


@pytest.mark.parametrize(
    "text", [" " * 3_000_000, "x" + "\t \n" * 700_000 + "y", "a" * 300_000, "^" * 300_000, "漢" * 200_000]
)
def test_monstrous_runs_neither_crash_nor_crawl(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode_array(text)) == text.encode()


def test_learning_survives_a_run_of_white_space_longer_than_the_regex_stack():
    assert len(learn([" " * (20 * LONGEST_SPACE) + "some words and some more words"], 270)) == 270 - len(SPECIAL_TOKENS)


def test_digits_come_in_groups_of_at_most_two(tokenizer):
    assert all(len(tokenizer.decode([token])) <= 2 for token in tokenizer.encode("1234567890"))


def test_special_tokens_follow_the_merges(tokenizer):
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(1024 - len(SPECIAL_TOKENS), 1024))
    assert tokenizer.vocab_size == 1024
    assert tokenizer.decode([tokenizer.bos_id]) == "<|bos|>"


def test_token_bytes_sum_to_the_text(tokenizer):
    text = "Fellow-Citizens of the Senate: é, 漢, 1862."
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert not sizes[tokenizer.bos_id :].any()


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.merges == tokenizer.merges
    assert loaded.sha256 == tokenizer.sha256


def test_learning_is_deterministic_and_a_smaller_vocabulary_is_a_prefix(corpus_folder):
    texts = list(sample(Corpus.open(corpus_folder), 500_000))
    assert learn(texts, 600) == learn(texts, 600) == learn(texts, 900)[: 600 - len(SPECIAL_TOKENS)]


def test_a_vocabulary_that_the_text_cannot_give_names_the_one_that_it_can():
    texts = ["abab abab cd"]
    with pytest.raises(
        UserError, match=r"tokenizer\.vocab_size = 500: the training text gives (\d+) entries"
    ) as caught:
        learn(texts, 500)
    achievable = int(str(caught.value).split("gives ")[1].split()[0])
    assert len(learn(texts, achievable)) == achievable - len(SPECIAL_TOKENS)
    with pytest.raises(UserError):
        learn(texts, achievable + 1)


def test_the_sample_is_spread_over_the_text(corpus_folder):
    corpus = Corpus.open(corpus_folder)
    everything = list(corpus.documents("train"))
    some = list(sample(corpus, corpus.text_bytes("train") // 4))
    assert 0.15 < sum(len(t.encode()) for t in some) / corpus.text_bytes("train") <= 0.25
    places = [i for i, document in enumerate(everything) if document.text in set(some)]
    assert places[0] < len(everything) / 4
    assert places[-1] > len(everything) * 3 / 4
    assert len(list(sample(corpus, 10**12))) == len(everything)


@pytest.mark.parametrize("change", ["merges", "special_tokens", "corpus_sha256", "pattern"])
def test_a_changed_tokenizer_is_found_when_it_is_read(tokenizer, tmp_path, change):
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    if change == "merges":
        content["merges"][300], content["merges"][301] = content["merges"][301], content["merges"][300]
    elif change == "special_tokens":
        content["special_tokens"]["<|bos|>"] = 5
    else:
        content[change] += "x"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: its content does not match its checksum"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"merges": 3, "checksum": "", "special_tokens": {}}'])
def test_what_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer of this program"):
        Tokenizer.load(tmp_path)


def test_peers_come_from_the_cache_only(tmp_path, monkeypatch, tokenizer, corpus_folder):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    def refused(*arguments, **named):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    metrics = measure(tokenizer, Corpus.open(corpus_folder))
    assert metrics["bytes_per_token"]["sotu"] == {
        "nanochat": metrics["bytes_per_token"]["all"]["nanochat"],
        "gpt2": None,
        "gpt4": None,
    }
    assert "r50k_base is not in tiktoken's cache" in metrics["missing"]["gpt2"]
    assert 2 < metrics["bytes_per_token"]["sotu"]["nanochat"] < 6
    assert metrics["encode_bytes_per_second"] > 100_000


def test_a_foreign_file_in_the_cache_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    key = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # sha1 of cl100k_base's address
    (tmp_path / key).write_bytes(b"YQ== 0\n")
    found, missing = train_tokenizer.peers()
    assert not found
    assert missing["gpt4"].endswith("is not the cl100k_base that tiktoken expects")


def test_the_command_writes_both_files(tmp_path, corpus_folder):
    settings = {"tokenizer": {"vocab_size": 512, "train_bytes": 500_000}, "text_column": "text"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    arguments = ["--config", str(tmp_path / "tokenizer.json"), "--corpus", str(corpus_folder)]
    assert main(["tokenizer", *arguments, "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["vocab_size"] == Tokenizer.load(tmp_path / "out").vocab_size == 512
    assert metrics["train_bytes"] <= 500_000
    assert Tokenizer.load(tmp_path / "out").corpus_sha256 == Corpus.open(corpus_folder).sha256


def test_the_pattern_is_gpt4s_but_for_the_digits():
    ours = tiktoken.Encoding(
        "ours", pat_str=PATTERN, mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    assert ours.encode_ordinary("It's 12345 o'clock") == BYTES.encode("It's 12345 o'clock")


def test_every_kind_of_held_out_text_is_measured(tmp_path, directory_settings, tokenizer, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "MEASURED_BYTES", 500)
    for kind in ("letters", "poems", "laws"):
        lines = [json.dumps({"text": f"{kind} number {i} " * 10}) + "\n" for i in range(200)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(lines))
    corpus.build(directory_settings(tmp_path), tmp_path / "out")
    metrics = measure(tokenizer, Corpus.open(tmp_path / "out"))
    assert metrics["bytes_per_token"].keys() == {"letters", "poems", "laws", "all"}
