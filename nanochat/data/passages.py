"""Sentences and words of a corpus, for tasks that are made from text: training conversations and held-out scores alike."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

# What ends a sentence, behind a word of three letters or more: "Mr. Adams" and "U.S. Army" are not cut.
_SENTENCE_END = re.compile(r"(?<=[a-z]{3}[.!?])[\"”’')]*\s+(?=[\"“‘'(]?[A-Z])")
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")
SENTENCE_WORDS = (6, 45)


@dataclass(frozen=True)
class Passages:
    """Sentences of each document in their order, and how often each word occurs."""

    sentences: list[list[str]]
    counts: Counter = field(repr=False)

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Passages":
        documents, counts = [], Counter()
        for text in texts:
            found = sentences(text)
            if len(found) >= 3:
                documents.append(found)
                counts.update(word.lower() for sentence in found for word in words(sentence))
        return cls(documents, counts)

    def drawer(self, source: random.Random) -> Callable[[int], tuple[list[str], str]]:
        """A function of `before` that draws so many consecutive sentences and the one that follows, fewer in front where
        the document is short; documents are drawn by their length."""
        weights = list(itertools.accumulate(len(document) for document in self.sentences))

        def draw(before: int) -> tuple[list[str], str]:
            document = source.choices(self.sentences, cum_weights=weights)[0]
            place = source.randrange(min(before, len(document) - 1), len(document))
            return document[max(0, place - before) : place], document[place]

        return draw

    def __bool__(self) -> bool:
        return bool(self.sentences)


def sentences(text: str) -> list[str]:
    """Sentences of ordinary length, in order; headings, lists and tables fall out."""
    shortest, longest = SENTENCE_WORDS
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        parts = _SENTENCE_END.split(" ".join(paragraph.split()))
        found += [
            part for part in parts if part.endswith((".", "!", "?")) and shortest <= part.count(" ") + 1 <= longest
        ]
    return found


def words(text: str) -> list[str]:
    return _WORD.findall(text)


def frequent_words(counts: Counter, limit: int, shortest: int = 4, longest: int = 12) -> list[str]:
    """The most frequent words of plain letters, at most `limit`, most frequent first and in one order always."""
    fitting = [word for word in counts if shortest <= len(word) <= longest and word.isascii() and word.isalpha()]
    return sorted(fitting, key=lambda word: (-counts[word], word))[:limit]


def unique(draws: Iterator, count: int, key, attempts: int = 20) -> list:
    """Up to `count` items with different keys; ends when new ones have become rare."""
    found: dict = {}
    for tried, item in enumerate(draws):
        if item is not None:
            found.setdefault(key(item), item)
        if len(found) >= count or tried > attempts * (count + 10):
            break
    return list(found.values())
