"""Conversations that are made: spelling, arithmetic with the calculator, multiple choice from training text."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanochat.data.chat import Message
from nanochat.data.heldout import choice_items, render_question
from nanochat.data.passages import frequent_words

if TYPE_CHECKING:
    from nanochat.data.conversation_sources import Material

# When the mixture does not say how many.
DEFAULT_COUNT = 1000
SPELLING_WORDS = 20_000

SPELL = [
    ("How do you spell {word}?", "{word} is spelled {letters}."),
    ("How do you spell the word {word}?", "The word {word} is spelled {letters}."),
    ("Spell {word}.", "{letters}."),
    ("Please spell the word {word} for me.", "{word} is spelled {letters}."),
    ("Can you spell {word}?", "Yes: {letters}."),
    ("What are the letters of {word}?", "The letters of {word} are {letters}."),
    ("Spell the word \"{word}\", letter by letter.", "{letters}."),
]  # fmt: skip
COUNT = [
    ("How many times does the letter {letter} occur in {word}?", "The letter {letter} occurs {times} in {word}."),
    ("How many {letter} are in the word {word}?", "There {are} {number} {letter} in {word}."),
    ("Count the letter {letter} in {word}.", "The word {word} holds {letter} {times}."),
]

ASK = {
    "+": ["What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "How much is {a} plus {b}?", "What is the sum of {a} and {b}?"],
    "-": ["What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?", "How much is {a} less {b}?", "Take {b} from {a}."],
    "*": ["What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b} = ?", "How much is {a} times {b}?", "What is the product of {a} and {b}?"],
    "/": ["What is {a} divided by {b}?", "Divide {a} by {b}.", "{a} / {b} = ?", "How often does {b} go into {a}?"],
}  # fmt: skip
STORIES = {
    "+": ["A farmer has {a} sheep and buys {b} more. How many has he now?", "{a} ships lie in the harbor and {b} arrive. How many are there?"],
    "-": ["The Treasury holds {a} dollars and pays {b}. How much is left?", "Of {a} soldiers {b} went home. How many stayed?"],
    "*": ["Each of {a} wagons carries {b} barrels. How many barrels is that?", "A clerk copies {a} pages a day. How many in {b} days?"],
    "/": ["{a} acres are shared by {b} settlers. How many does each get?", "{a} letters fill {b} equal bags. How many are in a bag?"],
}  # fmt: skip
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
ANSWER = ["{a} {op} {b} is {result}.", "That is {result}.", "The answer is {result}.", "It is {result}."]
LEAD = ["", "", "Let me calculate. ", "I calculate: "]


def spelling(material: "Material", count: int | None, stream: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """Words of the corpus, letter by letter; now and then a letter is counted, with the calculator."""
    words = frequent_words(material.passages.counts, SPELLING_WORDS, shortest=3, longest=14)
    if not words:
        return
    # Each word once before any comes again; the frequent ones first when not all are wanted.
    words = words[: max(1, count)] if count else words
    for i in range(count or len(words)):
        if i % len(words) == 0:
            stream.shuffle(words)
        word = words[i % len(words)]
        if stream.random() < 0.2:
            letter = stream.choice(word)
            number = word.count(letter)
            asked, said = stream.choice(COUNT)
            values = {
                "letter": letter,
                "word": word,
                "number": number,
                "are": "is" if number == 1 else "are",
                "times": "once" if number == 1 else f"{number} times",
            }
            reply = _with_tool("", f"'{word}'.count('{letter}')", str(number), said.format(**values))
            yield f"spelling {word}", _exchange(asked.format(**values), reply)
            continue
        asked, said = stream.choice(SPELL)
        letters = "-".join(word)
        answer = said.format(word=word, letters=letters)
        if said.startswith("{word}"):
            answer = answer[0].upper() + answer[1:]
        yield f"spelling {word}", _exchange(asked.format(word=word), answer)


def arithmetic(material: "Material", count: int | None, stream: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """One operation on whole numbers of one to four digits, by the calculator; the result is whole."""
    for _ in range(count or DEFAULT_COUNT):
        op = stream.choice("+-*/")
        a, b = (stream.randrange(1, 10 ** stream.choice((1, 2, 2, 3, 4))) for _ in range(2))
        if op == "-":
            a, b = max(a, b), min(a, b)
        elif op == "*":
            b = b % 1000 + 1
        elif op == "/":
            a, b = a * (b % 100 + 1), b % 100 + 1
        result = str({"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op])
        story = stream.random() < 0.2
        asked = stream.choice((STORIES if story else ASK)[op]).format(a=a, b=b)
        said = stream.choice(ANSWER[1:] if story else ANSWER).format(a=a, b=b, op=SPOKEN[op], result=result)
        yield f"arithmetic {a}{op}{b}", _exchange(asked, _with_tool(stream.choice(LEAD), f"{a}{op}{b}", result, said))


def multiple_choice(
    material: "Material", count: int | None, stream: random.Random
) -> Iterator[tuple[str, list[Message]]]:
    """Which word or sentence goes on a passage of the training text? The answer is a letter."""
    for item in choice_items(material.passages, count or DEFAULT_COUNT, stream):
        yield f"choice {item.context}", _exchange(render_question(item.question, item.choices), item.answer)


def _with_tool(lead: str, expression: str, result: str, said: str) -> list[dict[str, str]]:
    parts = [{"type": "text", "text": lead}] if lead else []
    return [
        *parts,
        {"type": "python", "text": expression},
        {"type": "output", "text": result},
        {"type": "text", "text": said},
    ]


def _exchange(asked: str, reply: str | list[dict[str, str]]) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
