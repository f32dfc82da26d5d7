"""Mixtures: deterministic, varied, right in what they teach, and nothing held out is trained on."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest

from nanochat import command_settings, config
from nanochat.cli import main
from nanochat.data import conversations, corpus, corpus_facts
from nanochat.data.chat import parts_of, require_format, text_of
from nanochat.data.conversation_files import Conversations
from nanochat.data.conversation_sources import IDENTITY, Conversation, Material, make, normal, read_jsonl
from nanochat.data.corpus_files import Corpus
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.infer.calculator import calculate

MIXTURE = config._sources(
    chatterbot=None, identity=200, corpus_facts=None, spelling=400, arithmetic=400, multiple_choice=300
)


@pytest.fixture(scope="module")
def material(corpus_folder):
    return Material(Corpus.open(corpus_folder))


@pytest.fixture(scope="module")
def mixed(corpus_folder):
    settings = command_settings.ConversationsSettings(stage="mid", seed=1, mixture=MIXTURE)
    return conversations.mixture(settings, Corpus.open(corpus_folder))


def made(material, name, count=None, seed="a", **more):
    return make(config.Source(name=name, conversations=count, **more), material, random.Random(seed))


def asked(conversation):
    return text_of(conversation.messages[0])


def test_every_conversation_is_of_the_format(mixed):
    for conversation in mixed[0] + mixed[1]:
        require_format(conversation.messages)
        assert conversation.messages[-1]["role"] == "assistant"


def test_no_question_of_validation_is_asked_in_training(mixed):
    train, validation = mixed
    assert len(validation) > 50
    assert not {q for c in train for q in c.questions} & {q for c in validation for q in c.questions}


def test_validation_keys_are_not_trained_on_in_any_wording(mixed):
    """A word that is spelled in validation is not spelled in training, whatever the question."""
    train, validation = mixed
    made_sources = {"spelling", "arithmetic", "multiple_choice"}
    trained = {c.key for c in train}
    assert not trained & {c.key for c in validation if c.source in made_sources}


def test_mid_and_sft_hold_out_the_same(corpus_folder):
    sides = {}
    for stage in ("mid", "sft"):
        settings = command_settings.ConversationsSettings(stage=stage, seed=1, mixture=config._sources(spelling=2000))
        sides[stage] = conversations.mixture(settings, Corpus.open(corpus_folder))
    for one, other in (("mid", "sft"), ("sft", "mid")):
        trained = {c.key for c in sides[one][0]}
        assert not trained & {c.key for c in sides[other][1]}


def test_a_held_out_conversation_with_a_question_of_training_is_in_neither():
    """Were it trained on, the other stage could hold it out: its mixture may not ask that question elsewhere."""

    def say(*texts):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return Conversation("jsonl", normal(texts[0]), messages)

    keys = [f"question {i}" for i in range(400)]
    held = [key for key in keys if conversations._share(key, 1) < conversations.HELD_OUT]
    kept = next(key for key in keys if key not in held)
    one, two, three = held[:3]
    everything = [say(kept, "a", two, "b"), say(two, "a", one.upper() + "?", "b"), say(one, "a"), say(three, "a")]
    train, validation = conversations.held_out(everything, seed=1)
    assert [c.key for c in validation] == [one, three]
    assert [c.key for c in train] == [kept]
    alone = conversations.held_out(everything[1:], seed=1)
    assert alone[0] == []
    assert two in [c.key for c in alone[1]]


def test_an_identity_question_is_held_out_with_every_greeting(corpus_folder):
    settings = command_settings.ConversationsSettings(stage="mid", seed=1, mixture=[config.Source(name="identity")])
    train, validation = conversations.mixture(settings, Corpus.open(corpus_folder))
    known = {question for subject in IDENTITY.values() for question in map(normal, subject[0])}
    asked = [{next(one for one in known if c.questions[0].endswith(one)) for c in side} for side in (train, validation)]
    assert validation
    assert not asked[0] & asked[1]


def test_a_question_with_several_answers_is_not_asked():
    facts = [
        ("a", ["Who wrote X?", "By whom is X?"], ["A."]),
        ("b", ["Who wrote X?"], ["B."]),
        ("c", ["When?"], ["1."]),
    ]
    kept = corpus_facts._unambiguous(facts)
    assert kept == [("a", ["By whom is X?"], ["A."]), ("c", ["When?"], ["1."])]


def test_the_same_seed_gives_the_same_and_another_does_not(corpus_folder, mixed):
    def plain(pair):
        return [[c.messages for c in side] for side in pair]

    settings = command_settings.ConversationsSettings(stage="mid", seed=1, mixture=MIXTURE)
    assert plain(conversations.mixture(settings, Corpus.open(corpus_folder))) == plain(mixed)
    other = settings.model_copy(update={"seed": 2})
    assert plain(conversations.mixture(other, Corpus.open(corpus_folder))) != plain(mixed)


@pytest.mark.parametrize(
    "name", ["identity", "spelling", "arithmetic", "multiple_choice", "corpus_facts", "chatterbot"]
)
def test_wordings_vary(material, name):
    found = made(material, name, 200)
    assert len(found) == 200
    first_words = Counter(" ".join(asked(c).split()[:2]) for c in found)
    assert len(first_words) >= 2
    assert len({json.dumps(c.messages) for c in found}) > 150


def test_results_are_those_of_the_calculator_and_they_are_said(material):
    found = made(material, "arithmetic", 500) + made(material, "spelling", 500)
    calls = 0
    for conversation in found:
        parts = parts_of(conversation.messages[1])
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                calls += 1
                assert calculate(call["text"]) == output["text"]
        if conversation.source == "arithmetic":
            assert parts[-2]["text"] in parts[-1]["text"]
    assert calls > 500


def test_words_are_spelled_right(material):
    spelled = 0
    for conversation in made(material, "spelling", 300):
        word = conversation.key.removeprefix("spelling ")
        assert word in asked(conversation)
        if isinstance(conversation.messages[1]["content"], str):
            spelled += 1
            assert "-".join(word) in conversation.messages[1]["content"]
    assert spelled > 150


def test_facts_come_from_the_training_text_only(corpus_folder, material):
    held = {d.metadata["date"][:4] for d in Corpus.open(corpus_folder).documents("validation")}
    held -= {d.metadata["date"][:4] for d in material.documents}
    assert held
    questions = [asked(c) for c in made(material, "corpus_facts")]
    assert not any(f"annual message of {year}" in question for year in held for question in questions)
    lincoln = [c for c in made(material, "corpus_facts") if asked(c) == "Who gave the annual message of 1801?"]
    assert all("Thomas Jefferson" in text_of(c.messages[1]) for c in lincoln)
    assert len(lincoln) == 1


def test_choices_are_answered_by_a_letter_that_is_there(material):
    for conversation in made(material, "multiple_choice", 100):
        letter = conversation.messages[1]["content"]
        assert letter in "ABCD"
        assert f"\n{letter}: " in asked(conversation)


def test_a_source_smaller_than_asked_for_repeats_evenly(tmp_path, material):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(dialogue(f"Question {i}?", f"Answer {i}.")) + "\n" for i in range(7)))
    counts = Counter(asked(c) for c in made(material, "jsonl", 20, path=str(path)))
    assert sum(counts.values()) == 20
    assert set(counts.values()) == {2, 3}
    assert len(made(material, "jsonl", 3, path=str(path))) == 3
    assert len(made(material, "jsonl", path=str(path))) == 7


def test_a_corpus_without_metadata_skips_the_facts_with_a_word(tmp_path, directory_settings, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Some text number {i}."}) + "\n" for i in range(50)))
    corpus.build(directory_settings(tmp_path / "a.jsonl"), tmp_path / "corpus")
    opened = Corpus.open(tmp_path / "corpus")
    settings = command_settings.ConversationsSettings(
        stage="sft", seed=1, mixture=config._sources(corpus_facts=None, identity=20)
    )
    train, _ = conversations.mixture(settings, opened)
    assert {c.source for c in train} == {"identity"}
    assert "corpus_facts: skipped, the corpus has no columns" in capsys.readouterr().err


def test_a_mixture_that_gives_nothing_is_an_error(tmp_path, directory_settings):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"Some text number {i}."}) + "\n" for i in range(50)))
    corpus.build(directory_settings(tmp_path / "a.jsonl"), tmp_path / "corpus")
    merges = [bytes([i]) for i in range(256)]
    Tokenizer(merges, Corpus.open(tmp_path / "corpus").sha256).save(tmp_path / "tokenizer")
    settings = command_settings.ConversationsSettings(stage="sft", seed=1, mixture=config._sources(corpus_facts=None))
    with pytest.raises(UserError, match=r"train\.sft\.mixture: gives no conversations from this corpus"):
        conversations.build(settings, tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "out")


def dialogue(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "line 2: Expecting value"),
        (b'{"role": "user"}', "line 2: a conversation is a list of messages"),
        (b'[{"role": "user", "content": "caf\xe9"}]', "line 2: not UTF-8"),
        (b'[{"role": "assistant", "content": "Hi"}]', "line 2: message 1 is of role 'assistant'"),
    ],
)
def test_what_is_wrong_in_ones_own_conversations_is_named(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(dialogue("Hi", "Hello")).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"chats\.jsonl: {message}"):
        read_jsonl(str(path))


def test_a_jsonl_source_without_a_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"mixture\.path = null: a source of name jsonl needs a path"):
        read_jsonl(None)
    with pytest.raises(UserError, match=r"mixture\.path = '.*nowhere\.jsonl': cannot be read: No such file"):
        read_jsonl(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no conversation"):
        read_jsonl(str(tmp_path / "empty.jsonl"))


def test_real_conversations_load(data_folder):
    for path in sorted((data_folder / "sft").glob("*.jsonl")):
        assert len(read_jsonl(str(path))) > 100


def test_the_command_writes_files_that_are_checked_when_read(tmp_path, corpus_folder, tokenizer_folder):
    settings = {"stage": "sft", "seed": 1, "mixture": [{"name": "arithmetic", "conversations": 200, "path": None}]}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    inputs = ["--corpus", str(corpus_folder), "--tokenizer", str(tokenizer_folder)]
    assert main(["conversations", "--config", str(tmp_path / "c.json"), *inputs, "--out", str(tmp_path / "out")]) == 0
    tokenizer = Tokenizer.load(tokenizer_folder)
    read = Conversations.open(tmp_path / "out", "train")
    ids, mask = read.read(0)
    assert tokenizer.decode(ids).startswith("<|bos|><|user_start|>")
    assert read.tokenizer_sha256 == tokenizer.sha256
    assert mask.sum() > 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["sources"] == {"arithmetic": metrics["splits"]["train"]["conversations"] + len(
        Conversations.open(tmp_path / "out", "validation"))}  # fmt: skip
    assert metrics["splits"]["train"]["loss_tokens"] == int(np.sum(read.mask))
    path = tmp_path / "out/train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin: [\d,]+ bytes, .*metrics\.json says"):
        Conversations.open(tmp_path / "out", "train")
