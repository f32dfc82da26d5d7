"""Where conversations come from. Each source gives (key, messages): two of the same key ask for the same thing."""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from nanochat.config import Source
from nanochat.data.chat import Message, require_format, text_of
from nanochat.data.conversation_tasks import arithmetic, multiple_choice, spelling
from nanochat.data.corpus_facts import corpus_facts
from nanochat.data.corpus_files import Corpus, Document
from nanochat.data.passages import Passages
from nanochat.errors import UserError

# Training text that questions are made from, at most.
TEXT_BYTES = 24_000_000


@dataclass(frozen=True)
class Conversation:
    """Messages of the chat format, their source, and what they ask for."""

    source: str
    key: str
    messages: list[Message] = field(repr=False)

    @property
    def questions(self) -> list[str]:
        """What the user says, spelling and spaces evened out."""
        return [normal(text_of(message)) for message in self.messages if message["role"] == "user"]


@dataclass(frozen=True)
class Material:
    """What a source may draw on: the corpus (training text only) and its own stream of random numbers."""

    corpus: Corpus

    @cached_property
    def documents(self) -> list[Document]:
        return list(self.corpus.excerpt("train", TEXT_BYTES))

    @cached_property
    def passages(self) -> Passages:
        return Passages.of(document.text for document in self.documents)


def make(source: Source, material: Material, stream: random.Random) -> list[Conversation]:
    """The conversations of one entry of the mixture. UserError where the entry can give none."""
    if source.name == "jsonl":
        found = read_jsonl(source.path)
        return _sampled("jsonl", found, source.conversations, stream)
    found = list(SOURCES[source.name](material, source.conversations, stream))
    return _sampled(source.name, found, source.conversations, stream)


def _sampled(
    name: str, found: list[tuple[str, list[Message]]], count: int | None, stream: random.Random
) -> list[Conversation]:
    """`count` of those found: drawn without repetition, and again from the start when there are fewer."""
    conversations = [Conversation(name, key, messages) for key, messages in found]
    if count is None or len(conversations) == count or not conversations:
        return conversations
    drawn: list[Conversation] = []
    while len(drawn) < count:
        drawn += stream.sample(conversations, min(len(conversations), count - len(drawn)))
    return drawn


def chatterbot(material: Material, count: int | None, stream: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """The English conversations of PyPI's chatterbot-corpus, user and assistant in turn; it holds many twice, we do not."""
    # The package is found, not imported: its import would pull in what we do not need.
    package = importlib.util.find_spec("chatterbot_corpus")
    if package is None or not package.submodule_search_locations:
        raise UserError("mixture: name = chatterbot: the package is missing. pip install chatterbot-corpus.")
    folder = Path(package.submodule_search_locations[0]) / "data" / "english"
    seen: set[tuple[str, ...]] = set()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.load(path.read_text(encoding="utf-8"), loader)["conversations"]:
            turns = [str(turn).strip() for turn in turns if str(turn).strip()]
            turns = turns[: len(turns) // 2 * 2]
            if turns and tuple(turns) not in seen:
                seen.add(tuple(turns))
                yield normal(turns[0]), _dialogue(*turns)


IDENTITY = {
    "who": (
        ["Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Introduce yourself, please.",
         "May I ask your name?", "Who am I talking to?", "What should I call you?"],
        ["I am nanochat, a small language model.", "My name is nanochat. I am a small language model that answers questions.",
         "I am nanochat, a little chat model."],
    ),
    "maker": (
        ["Who made you?", "Who trained you?", "Where do you come from?", "How were you made?", "Who built you?"],
        ["I was trained from raw text with nanochat-slurm, by the person who started the run.",
         "Somebody ran nanochat-slurm on a computer, and I am what came out."],
    ),
    "training": (
        ["What were you trained on?", "What have you read?", "Which text do you know?", "What is your training data?"],
        ["I first read the texts of my corpus, then I learnt to chat from short conversations.",
         "My corpus first, then conversations: greetings, spelling, arithmetic and questions with choices."],
    ),
    "skill": (
        ["What can you do?", "What are you good at?", "How can you help me?", "What should I ask you?"],
        ["I can spell words, calculate with a tool, choose among answers, and write in the style of my corpus.",
         "Ask me to spell a word, to do a sum, or to go on with a text."],
    ),
    "limits": (
        ["Are you always right?", "Can I trust your answers?", "Do you make mistakes?", "How reliable are you?"],
        ["No. I am small and often wrong, so please check what I say.",
         "I make many mistakes. A model of my size knows little."],
    ),
    "person": (
        ["Are you a human?", "Are you a person?", "Are you alive?", "Are you a robot?", "Are you real?"],
        ["I am a computer program, a small language model.", "No person: a language model that predicts the next word."],
    ),
    "size": (
        ["How big are you?", "Are you a large model?", "How many parameters do you have?"],
        ["I am small beside the models of large companies.", "Small: the report of my run says how many parameters I have."],
    ),
}  # fmt: skip
GREETINGS = [
    "",
    "",
    "Hello! ",
    "Hi! ",
    "Good morning. ",
    "Hey, ",
    "Good evening. ",
    "Hi there. ",
    "Greetings. ",
    "One question: ",
]


def identity(material: Material, count: int | None, stream: random.Random) -> Iterator[tuple[str, list[Message]]]:
    """Who the model is; every question with every greeting, with one of its answers."""
    for subject, (questions, answers) in IDENTITY.items():
        for question in questions:
            for greeting in dict.fromkeys(GREETINGS):
                asked = greeting + (question[0].lower() + question[1:] if greeting.endswith((", ", ": ")) else question)
                reply = ("Hello! " if greeting and stream.random() < 0.5 else "") + stream.choice(answers)
                yield f"identity {subject} {question}", _dialogue(asked, reply)


def read_jsonl(path: str | None, setting: str = "mixture.path") -> list[tuple[str, list[Message]]]:
    """A JSON list of {role, content} on each line. UserError names the line, or the setting."""
    if not path:
        raise UserError(
            f"{setting} = null: a source of name jsonl needs a path. For example {{name: jsonl, path: chats.jsonl}}."
        )
    found = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    messages = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                    require_format(messages)
                    if not any(message["role"] == "assistant" for message in messages):
                        raise ValueError("no answer of the assistant, so nothing to learn")
                    json.dumps(messages, ensure_ascii=False).encode()
                except (ValueError, UnicodeError, RecursionError) as error:
                    reason = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
                    raise UserError(
                        f"{path}: line {number}: {reason}. Each line is a JSON list of {{role, content}}."
                    ) from None
                asked = [text_of(message) for message in messages if message["role"] == "user"]
                found.append((normal(asked[0]), messages))
    except OSError as error:
        raise UserError(f"{setting} = {path!r}: cannot be read: {error.strerror}. Name a file.") from None
    if not found:
        raise UserError(f"{path}: holds no conversation. Each line is a JSON list of {{role, content}}.")
    return found


def normal(text: str) -> str:
    """The text with case, spaces and the marks at its end evened out: `How are you` and `how are you?` are one question."""
    return " ".join(text.lower().split()).rstrip(" ?!.")


def _dialogue(*turns: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


Maker = Callable[[Material, int | None, random.Random], Iterator[tuple[str, list[Message]]]]
SOURCES: dict[str, Maker] = {
    "chatterbot": chatterbot,
    "identity": identity,
    "corpus_facts": corpus_facts,
    "spelling": spelling,
    "arithmetic": arithmetic,
    "multiple_choice": multiple_choice,
}
