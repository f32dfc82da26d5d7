"""Cloze and multiple choice: from held-out text alone, the same at every call, with fair chances."""

import random
import re

import pytest

from nanochat.data.conversation_sources import Material
from nanochat.data.conversation_tasks import multiple_choice
from nanochat.data.corpus_files import Corpus
from nanochat.data.heldout import LETTERS, choice_items, cloze_items, multiple_choice_items, render_question
from nanochat.data.passages import Passages, sentences


@pytest.fixture(scope="module")
def held_out(corpus_folder):
    return [" ".join(document.text.split()) for document in Corpus.open(corpus_folder).documents("validation")]


def test_a_cloze_is_a_passage_of_held_out_text(corpus_folder, held_out):
    items = cloze_items(corpus_folder, 60, seed=3)
    assert len(items) > 20
    for item in items:
        last = " ".join((item.context + item.target).split()[-6:])
        assert any(last in text for text in held_out)
        assert not item.context.endswith(" ")
        assert item.target[0] == " "
        assert item.target[1:].lower() in item.context.lower()
        assert 0 < item.chance < 0.2


def test_choices_are_of_held_out_text_with_the_right_one_among_them(corpus_folder, held_out):
    items = multiple_choice_items(corpus_folder, 100, seed=3)
    assert len(items) == 100
    assert {item.style for item in items} == {"word", "sentence"}
    for item in items:
        right = item.choices[item.answer_index]
        assert len(set(item.choices)) == len(LETTERS)
        if item.style == "sentence":
            assert all(any(choice in text for text in held_out) for choice in item.choices)
        else:
            assert any(plain(f"{item.context} {right}") in plain(text) for text in held_out)


def plain(text):
    return re.sub(r"[^a-z]+", " ", text.lower()).strip()


def test_items_are_the_same_at_every_call_and_differ_by_seed(corpus_folder):
    for make in (cloze_items, multiple_choice_items):
        assert make(corpus_folder, 30, 1) == make(corpus_folder, 30, 1) != make(corpus_folder, 30, 2)


def test_no_letter_is_right_more_often(corpus_folder):
    items = multiple_choice_items(corpus_folder, 400, seed=1)
    counts = [sum(item.answer == letter for item in items) for letter in LETTERS]
    assert sum(counts) == 400
    assert min(counts) > 70


def test_training_and_evaluation_ask_in_the_same_form(corpus_folder):
    material = Material(Corpus.open(corpus_folder))
    item = choice_items(material.passages, 1, random.Random(5))[0]
    _, messages = next(multiple_choice(material, 1, random.Random(5)))
    assert messages[0]["content"] == render_question(item.question, item.choices)
    assert messages[1]["content"] == item.answer


def test_training_questions_hold_no_held_out_sentence(corpus_folder, held_out):
    material = Material(Corpus.open(corpus_folder))
    train = {sentence for document in material.passages.sentences for sentence in document}
    for item in choice_items(material.passages, 100, random.Random(1)):
        if item.style == "sentence":
            assert set(item.choices) <= train


def test_a_letter_is_the_same_token_in_question_and_answer(corpus_folder, tokenizer):
    item = multiple_choice_items(corpus_folder, 1, seed=1)[0]
    ids = tokenizer.encode(render_question(item.question, item.choices))
    for letter in LETTERS:
        (token,) = tokenizer.encode(letter)
        assert token in ids


def test_too_little_text_gives_no_items_and_does_not_hang():
    assert choice_items(Passages.of(["Too short. A text."]), 5, random.Random(1)) == []
    few = Passages.of(
        ["The first of all sentences here. The second sentence is not longer. And the third one ends it all."]
    )
    assert choice_items(few, 5, random.Random(1)) == []


def test_sentences_end_where_they_end():
    text = "Mr. Adams of the U.S. Army went to Mt. Vernon at once. Did he like it there at all?\n\nTHE NEXT CHAPTER"
    assert sentences(text) == ["Mr. Adams of the U.S. Army went to Mt. Vernon at once.", "Did he like it there at all?"]


def test_the_frequency_of_a_word_does_not_tell_that_it_is_right(corpus_folder):
    """Wrong words were drawn evenly from 4,000: the most frequent of the four in training text was right in 58%."""
    corpus = Corpus.open(corpus_folder)
    counts = Passages.of(document.text for document in corpus.documents("train")).counts
    items = [item for item in multiple_choice_items(corpus_folder, 800, seed=1) if item.style == "word"]
    right = sum(max(item.choices, key=lambda word: counts[word]) == item.choices[item.answer_index] for item in items)
    assert len(items) > 300
    assert right / len(items) < 0.36
