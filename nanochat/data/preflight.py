"""What can be known about the text before any job is queued.

Runs at each call of the workflow, so it looks at as little as decides: footers, encodings of small sources whole and of big
ones in samples, and only so much text as shows that there is enough.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

from nanochat import config
from nanochat.data.conversation_sources import read_jsonl
from nanochat.data.corpus import local_pieces, share_of, text_column
from nanochat.data.text_files import Document, Piece, documents
from nanochat.data.tokenizer import Tokenizer
from nanochat.data.train_tokenizer import learn
from nanochat.errors import UserError

# Text files up to this size together are read whole to find what is not UTF-8 or no JSON; of more, samples.
SCAN_BYTES = 256_000_000
SAMPLE_BYTES = 1_000_000
SAMPLES = 64
# Text looked at to tell whether there is enough. No verdict on more: the stages will say.
ENOUGH_BYTES = 64_000_000
FIRST_BYTES = 1_500_000
# No tokenizer gets more bytes into a token on average, so this much text a token is surely enough.
BYTES_PER_TOKEN = 16


def preflight(settings: config.Config) -> None:
    """Raise UserError for text that is missing, damaged or too little for the settings.

    A message begins with the file that is wrong, or with `key = value`: who knows which file sets the key puts it in front.
    """
    corpus = settings.corpus
    for stage in ("mid", "sft"):
        for i, source in enumerate(getattr(settings.train, stage).mixture):
            if source.name == "jsonl" and not (source.path and _big(source.path)):
                read_jsonl(source.path, f"train.{stage}.mixture.{i}.path")
    if corpus.source == "huggingface":
        return  # Nothing is here yet, and the network may be closed on this machine.
    pieces = local_pieces(corpus)
    if corpus.source == "directory":
        _scan(pieces, corpus.text_column)
    _require_enough(settings, pieces)


def _big(path: str) -> bool:
    return os.path.exists(path) and os.path.getsize(path) > SCAN_BYTES


def _scan(pieces: list[Piece], column: str) -> None:
    """Read the text files, or samples of them, so that what is wrong in them shows."""
    pieces = [piece for piece in pieces if not piece.path.endswith(".parquet")]
    total = sum(piece.stop - piece.start for piece in pieces)
    if total > SCAN_BYTES:
        # The beginnings of pieces spread over all files; a line that a sample begins in belongs to another one.
        pieces = pieces[:: max(1, len(pieces) // SAMPLES)]
        pieces = [replace(piece, stop=min(piece.stop, piece.start + SAMPLE_BYTES)) for piece in pieces]
    for piece in pieces:
        for _ in documents(piece, column):
            pass


def _require_enough(settings: config.Config, pieces: list[Piece]) -> None:
    """Enough text for the vocabulary, one validation row and one training step."""
    corpus, base = settings.corpus, settings.train.base
    source = (document for piece in pieces for document in documents(piece, text_column(corpus)))
    texts = (document.text for document in _limited(source, corpus.max_bytes))
    train: list[str] = []
    held: list[str] = []
    lowest = 2.0
    size = {"train": 0, "held": 0}
    for target in (FIRST_BYTES, FIRST_BYTES * 6, ENOUGH_BYTES):
        for text in texts:
            share = share_of(text, settings.seed)
            side = "held" if share <= corpus.validation_fraction else "train"
            lowest = min(lowest, share)
            (held if side == "held" else train).append(text)
            size[side] += len(text.encode())
            if size["train"] + size["held"] >= target:
                break
        else:
            break
        if (
            size["held"] >= BYTES_PER_TOKEN * (base.sequence_length + 1)
            and size["train"] >= BYTES_PER_TOKEN * base.tokens_per_step
            and _gives(train, settings.tokenizer)
        ):
            return
    else:
        return
    if not held and train:
        # As the corpus stage does: where no document falls below the fraction, the lowest one is held out.
        held = [text for text in train if share_of(text, settings.seed) <= lowest]
        train = [text for text in train if share_of(text, settings.seed) > lowest]
    _judge(settings, train, held)


def _judge(settings: config.Config, train: list[str], held: list[str]) -> None:
    """All the text is here: train the tokenizer and count."""
    corpus, base = settings.corpus, settings.train.base
    where = f"corpus.paths = {corpus.paths}" if corpus.source == "directory" else f"corpus.source = {corpus.source}"
    if not train and not held:
        raise UserError(f"{where}: holds no text. Give at least two documents.")
    if not train or not held:
        raise UserError(
            f"corpus.validation_fraction = {corpus.validation_fraction}: of {len(train) + len(held)} documents "
            "that leaves no text to train on. Give more documents or a smaller fraction."
        )
    _require_tokens(held, len(held) + sum(len(text.encode()) for text in held), settings)
    tokenizer = Tokenizer(learn(_first_bytes(train, settings.tokenizer.train_bytes), settings.tokenizer.vocab_size))
    _require_tokens(held, sum(1 + len(tokenizer.encode(text)) for text in held), settings)
    tokens = sum(1 + len(tokenizer.encode(text)) for text in train)
    if tokens < base.tokens_per_step + 1:
        raise UserError(
            f"train.base.tokens_per_step = {base.tokens_per_step}: the text gives only {tokens:,} tokens to "
            f"train on, less than one step. Give more text, or {tokens - 1:,} tokens a step at most."
        )


def _require_tokens(held: list[str], tokens: int, settings: config.Config) -> None:
    """`tokens`: how many the held-out text has, or an upper bound of it (each byte one)."""
    length = settings.train.base.sequence_length
    if tokens < length + 1:
        raise UserError(
            f"corpus.validation_fraction = {settings.corpus.validation_fraction}: holds out {len(held)} documents of "
            f"at most {tokens:,} tokens, one validation row needs train.base.sequence_length + 1 = {length + 1:,}. "
            "Give more text, a larger fraction or shorter rows."
        )


def _gives(train: list[str], settings: config.Tokenizer) -> bool:
    """Whether these texts alone give the vocabulary; more text only gives more."""
    try:
        learn(_first_bytes(train, settings.train_bytes), settings.vocab_size)
    except UserError:
        return False
    return True


def _first_bytes(texts: list[str], limit_bytes: int) -> Iterator[str]:
    taken = 0
    for text in texts:
        taken += len(text.encode())
        if taken > limit_bytes:
            return
        yield text


def _limited(source: Iterator[Document], limit_bytes: int | None) -> Iterator[Document]:
    taken = 0
    for document in source:
        taken += len(document.text.encode())
        if limit_bytes is not None and taken > limit_bytes:
            return
        yield document
