"""Conversations about the corpus, from what its source says of each document: title, president or author, date, description."""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nanochat.data.chat import Message
from nanochat.data.corpus_files import Document
from nanochat.data.passages import sentences
from nanochat.progress import say

if TYPE_CHECKING:
    from nanochat.data.conversation_sources import Material

MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
# Sentences of a document that are asked about.
QUOTES = 4
LONGEST_ANSWER_WORDS = 40

Fact = tuple[str, list[str], list[str]]  # key, ways to ask, ways to answer


def corpus_facts(material: "Material", count: int | None, stream: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """Each fact with each way to ask for it; nothing, with a word, where the corpus has no such columns."""
    facts = _unambiguous(_facts(material.documents, stream))
    if not facts:
        say(
            "conversations", "corpus_facts: skipped, the corpus has no columns such as title, president, author or date"
        )
    for key, questions, answers in facts:
        for question in questions:
            reply = {"role": "assistant", "content": stream.choice(answers)}
            yield f"fact {key}", [{"role": "user", "content": question}, reply]


def _facts(documents: list[Document], stream: random.Random) -> Iterator[Fact]:
    """Facts of all documents."""
    messages = [d for d in documents if d.metadata.get("president") and _year(d)]
    yield from _presidents(messages, stream)
    titled: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        if document.metadata.get("title") and not document.metadata.get("president"):
            titled[document.metadata["title"]].append(document)
    for title, group in titled.items():
        for document in group:
            yield from _titled(title, document)


def _unambiguous(facts: Iterable[Fact]) -> list[Fact]:
    """Without the questions that several documents answer differently."""
    facts = list(facts)
    answered: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for _, questions, answers in facts:
        for question in questions:
            answered[question].add(tuple(answers))
    kept = [
        (key, [question for question in questions if len(answered[question]) == 1], a) for key, questions, a in facts
    ]
    return [(key, questions, answers) for key, questions, answers in kept if questions]


def _presidents(documents: list[Document], stream: random.Random) -> Iterator[Fact]:
    by_year: dict[str, set[str]] = defaultdict(set)
    by_president: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        by_year[_year(document)].add(document.metadata["president"])
        by_president[document.metadata["president"]].add(_year(document))
    for year, names in by_year.items():
        who = " and ".join(sorted(names))
        yield (
            f"message {year}",
            [f"Who gave the annual message of {year}?", f"Which president spoke to the Congress in {year}?",
             f"Who wrote the annual message to Congress in {year}?", f"Whose message is that of {year}?"],
            [f"The annual message of {year} is by {who}.", f"It is by {who}.", f"{who}."],
        )  # fmt: skip
    for name, years in by_president.items():
        listed = ", ".join(sorted(years))
        yield (
            f"years {name}",
            [f"When did {name} give his annual messages?", f"From which years are the messages of {name}?"],
            [f"The messages of {name} are of {listed}.", f"In {listed}."],
        )
    for document in documents:
        yield from _message(document, stream)


def _message(document: Document, stream: random.Random) -> Iterator[Fact]:
    """When it was given, how it begins, and who wrote some of its sentences."""
    name, date, year = document.metadata["president"], document.metadata.get("date", ""), _year(document)
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        day = f"{MONTHS[int(date[5:7]) - 1]} {int(date[8:])}, {year}"
        yield (
            f"day {date}",
            [
                f"On which day did {name} address the Congress in {year}?",
                f"When exactly was the message of {year} by {name}?",
            ],
            [f"On {day}.", f"{name} gave it on {day}."],
        )
    found = sentences(document.text)
    if found:
        yield (
            f"opening {name} {date}",
            [f"How does the message of {year} by {name} begin?", f"What does {name} say first in {year}?"],
            [f"It begins: {found[0]}", found[0]],
        )
    for quote in stream.sample(found, min(QUOTES, len(found))):
        yield (
            f"quote {quote}",
            [f'Which president said: "{quote}"', f'Who wrote this? "{quote}"'],
            [f"{name}, in {year}.", f"That is from the message of {year} by {name}."],
        )


def _titled(title: str, document: Document) -> Iterator[Fact]:
    """Books, articles and whatever else has a title."""
    author, year = document.metadata.get("author"), _year(document)
    description = document.metadata.get("description")
    if author:
        yield (
            f"author {title}",
            [f"Who wrote {title}?", f"Who is the author of {title}?", f"By whom is {title}?"],
            [f"{title} is by {author}.", f"{author} wrote {title}.", f"{author}."],
        )
    if year:
        yield (
            f"year {title}",
            [f"When was {title} published?", f"From which year is {title}?"],
            [f"In {year}.", f"{year}."],
        )
    if description:
        yield (
            f"description {title}",
            [f"What is {title}?", f"Tell me in a few words what {title} is.", f"Describe {title} briefly."],
            [f"{title}: {description}.", f"{description}."],
        )
    elif not author:
        found = sentences(document.text)
        if found and len(found[0].split()) <= LONGEST_ANSWER_WORDS:
            yield f"about {title}", [f"What do you know about {title}?", f"Tell me about {title}."], [found[0]]


def _year(document: Document) -> str:
    match = re.search(r"\b(\d{4})\b", document.metadata.get("date") or document.metadata.get("year") or "")
    return match.group(1) if match else ""
