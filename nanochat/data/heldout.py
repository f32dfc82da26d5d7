"""Tasks made from text: a cloze and a multiple-choice task. The scores are taken on held-out text; the training conversations
about multiple choice are made from training text by the same code, so that the two agree in every character.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.corpus_files import Corpus
from nanochat.data.passages import Passages, frequent_words, unique, words

LETTERS = "ABCD"
# Held-out text that the items are drawn from, at most.
TEXT_BYTES = 20_000_000
CLOZE_CONTEXT_WORDS = (20, 90)
NEIGHBOURS = 40  # in the order of frequency, from which wrong words are drawn
CHOICE_CONTEXT_WORDS = 8  # at least, where the next word is asked for


@dataclass(frozen=True)
class ClozeItem:
    """Predict the last word of a passage (after LAMBADA, Paperno et al. 2016): a word that stands in it before."""

    context: str  # ends without a space
    target: str  # begins with the space: context + target is the passage
    chance: float  # of one who picks among the context's words of that length or more


@dataclass(frozen=True)
class ChoiceItem:
    """Which of four goes on? `style` word: the next word of a sentence; sentence: the next sentence of a passage."""

    style: str
    context: str
    choices: tuple[str, ...]
    answer_index: int

    @property
    def question(self) -> str:
        what = "word" if self.style == "word" else "sentence"
        return f"Which {what} comes next?\n\n{self.context}"

    @property
    def answer(self) -> str:
        return LETTERS[self.answer_index]


def render_question(question: str, choices: tuple[str, ...] | list[str]) -> str:
    """What the user asks. A letter opens its line, so that it is the same token as in the answer."""
    lines = [f"{letter}: {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return f"{question}\n\n" + "\n".join(lines) + "\n\nAnswer with the letter only."


def cloze_items(corpus_folder: str | Path, count: int, seed: int) -> list[ClozeItem]:
    """Up to `count` different items from the validation split: fewer where the text gives no more. The same at every call."""
    passages = _held_out(corpus_folder)
    if not passages:
        return []
    source = random.Random(f"cloze {seed}")
    return unique(_clozes(passages, source), count, key=lambda item: (item.context[-200:], item.target))


def multiple_choice_items(corpus_folder: str | Path, count: int, seed: int) -> list[ChoiceItem]:
    """Up to `count` different items from the validation split, both styles in turn. The same at every call. Chance: 1/4."""
    return choice_items(_held_out(corpus_folder), count, random.Random(f"choice {seed}"))


def choice_items(passages: Passages, count: int, source: random.Random) -> list[ChoiceItem]:
    """Up to `count` different items from any text."""
    if sum(map(len, passages.sentences)) < 2 * len(LETTERS):
        return []
    return unique(_choices(passages, source), count, key=lambda item: (item.style, item.context))


def _held_out(corpus_folder: str | Path) -> Passages:
    return Passages.of(document.text for document in Corpus.open(corpus_folder).excerpt("validation", TEXT_BYTES))


def _clozes(passages: Passages, source: random.Random) -> Iterator[ClozeItem | None]:
    draw = passages.drawer(source)
    while True:
        before, last = draw(source.choice((1, 2, 3)))
        passage = " ".join([*before, last]).rstrip(".!?\"”’')")
        context, _, target = passage.rpartition(" ")
        earlier = {word.lower() for word in words(context) if len(word) >= 4}
        fits = CLOZE_CONTEXT_WORDS[0] <= context.count(" ") + 1 <= CLOZE_CONTEXT_WORDS[1]
        if fits and len(target) >= 4 and target.isalpha() and target.lower() in earlier:
            yield ClozeItem(context, f" {target}", 1 / len(earlier))
        else:
            yield None


def _choices(passages: Passages, source: random.Random) -> Iterator[ChoiceItem | None]:
    draw = passages.drawer(source)
    vocabulary = frequent_words(passages.counts, 4000)
    ranks = {word: rank for rank, word in enumerate(vocabulary)}
    for turn in range(10**12):
        if turn % 2:
            before, right = draw(1)
            wrong = [draw(0)[1] for _ in LETTERS[1:]]
            yield _item("sentence", " ".join(before), right, wrong, source)
            continue
        _, sentence = draw(0)
        tokens = sentence.split()
        if len(tokens) <= CHOICE_CONTEXT_WORDS:
            yield None
            continue
        place = source.randrange(max(CHOICE_CONTEXT_WORDS, len(tokens) // 2), len(tokens))
        right = tokens[place].strip(".,;:!?\"“”‘’'()").lower()
        if right not in ranks or len(vocabulary) < 50:
            yield None
            continue
        wrong = _as_frequent(vocabulary, ranks[right], source)
        yield _item("word", " ".join(tokens[:place]), right, wrong, source)


def _as_frequent(vocabulary: list[str], rank: int, source: random.Random) -> list[str]:
    """Three other words about as frequent as the one of this rank, so that frequency alone tells nothing: it is as often the most
    frequent of the four as the second, third or least."""
    above, below = vocabulary[max(0, rank - NEIGHBOURS) : rank], vocabulary[rank + 1 : rank + 1 + NEIGHBOURS]
    wanted = len(LETTERS) - 1
    more = min(source.randrange(wanted + 1), len(above))
    more = max(more, wanted - len(below))
    return source.sample(above, more) + source.sample(below, wanted - more)


def _item(style: str, context: str, right: str, wrong: list[str], source: random.Random) -> ChoiceItem | None:
    """Put the right choice at a random place; None where two choices are the same."""
    if len({right, *wrong}) < len(LETTERS):
        return None
    place = source.randrange(len(LETTERS))
    choices = [*wrong[:place], right, *wrong[place:]]
    return ChoiceItem(style, context, tuple(choices), place)
