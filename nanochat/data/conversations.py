"""Make the conversations of a mixture and encode them.

Reads  --config    results/config/conversations_mid.json (or _sft)
       --corpus    results/corpus, for questions made from its training text
       --tokenizer results/tokenizer
Writes --out       train.bin (token ids), train.mask.npy (1: the assistant's tokens, which carry loss), train.idx.npy (where
                   conversations start), the same for validation, metrics.json

The same seed gives the same bytes. A share is held out: by what a conversation asks for first, so that no conversation of the
validation part stands in the training part in any wording, in mid or in sft; nor does any later question of it, in its own stage.
"""

import argparse
import hashlib
import random
import time
from collections import Counter
from pathlib import Path

from nanochat import command_settings
from nanochat.data.chat import render
from nanochat.data.conversation_files import write_split
from nanochat.data.conversation_sources import Conversation, Material, make
from nanochat.data.corpus_files import Corpus
from nanochat.data.token_shards import dtype_of
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.files import read_settings, write_json
from nanochat.progress import Progress, say

HELD_OUT = 0.05
MANY = 200  # conversations of which some should be held out
FORMAT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--corpus", required=True, help="folder of the corpus stage")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer stage")
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments.config, command_settings.ConversationsSettings)
    build(settings, arguments.corpus, arguments.tokenizer, arguments.out)


def build(
    settings: command_settings.ConversationsSettings,
    corpus_folder: str | Path,
    tokenizer_folder: str | Path,
    out: str | Path,
) -> dict:
    """Make, split, encode and write; returns what metrics.json holds."""
    started = time.monotonic()
    corpus, tokenizer = Corpus.open(corpus_folder), Tokenizer.load(tokenizer_folder)
    tokenizer.require_corpus(corpus.sha256, tokenizer_folder, corpus_folder)
    train, validation = mixture(settings, corpus)
    if not train:
        raise UserError(f"train.{settings.stage}.mixture: gives no conversations from this corpus. Add a source to it.")
    stage = f"conversations {settings.stage}"
    progress = Progress(stage, len(train) + len(validation), "conversation")
    done = 0

    def encoded(conversations: list[Conversation]):
        nonlocal done
        for conversation in conversations:
            yield render(tokenizer, conversation.messages)
            done += 1
            progress.update(done)

    out, dtype = Path(out), dtype_of(tokenizer.vocab_size)
    splits = {
        "train": write_split(out, "train", encoded(train), dtype),
        "validation": write_split(out, "validation", encoded(validation), dtype),
    }
    metrics = {
        "format": FORMAT,
        "stage": settings.stage,
        "dtype": str(dtype),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "bos_id": tokenizer.bos_id,
        "sources": dict(Counter(conversation.source for conversation in train + validation)),
        "train_tokens": splits["train"]["tokens"],
        "validation_tokens": splits["validation"]["tokens"],
        "splits": splits,
        "seconds": time.monotonic() - started,
    }
    write_json(out / "metrics.json", metrics)
    say(stage, f"{len(train):,} to train on with {splits['train']['tokens']:,} tokens, {len(validation):,} held out")
    return metrics


def mixture(
    settings: command_settings.ConversationsSettings, corpus: Corpus
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation conversations, each in an order drawn from the seed."""
    material = Material(corpus)
    found: list[Conversation] = []
    for number, source in enumerate(settings.mixture):
        stream = random.Random(f"{settings.seed} {settings.stage} {number} {source.name}")
        made = make(source, material, stream)
        if not made:
            say(f"conversations {settings.stage}", f"{source.name}: gives none from this corpus")
        found += made
    train, validation = held_out(found, settings.seed)
    if len(found) >= MANY and not validation:
        say(f"conversations {settings.stage}", "none is held out: every one shares a question with others")
    stream = random.Random(f"{settings.seed} {settings.stage} order")
    stream.shuffle(train)
    stream.shuffle(validation)
    return train, validation


def held_out(conversations: list[Conversation], seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Split by a hash of what each asks for; a held-out one any of whose questions is also asked in training is dropped.

    It does not go to training: the other stage, whose mixture shares other questions, may hold it out.
    """
    train, validation = [], []
    for conversation in conversations:
        (validation if _share(conversation.key, seed) < HELD_OUT else train).append(conversation)
    asked = {question for conversation in train for question in conversation.questions}
    validation = [conversation for conversation in validation if asked.isdisjoint(conversation.questions)]
    # Repetitions weigh in training; in validation they would only cost time.
    unique = {tuple(c.questions): c for c in validation}
    return train, list(unique.values())


def _share(key: str, seed: int) -> float:
    """Where the key falls in [0, 1). The seed alone decides, so that mid and sft hold out the same."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64
