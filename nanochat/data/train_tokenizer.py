"""Learn the merges of the byte-level BPE from the corpus, and measure the tokenizer on held-out text.

Reads  --config  results/config/tokenizer.json
       --corpus  results/corpus
Writes --out     tokenizer.json (merges in rank order, special tokens), metrics.json (bytes per token by kind of text, beside
                 GPT-2's and GPT-4's encodings where tiktoken has them cached; encode speed)
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import rustbpe
import tiktoken

from nanochat import command_settings
from nanochat.data.corpus_files import Corpus
from nanochat.data.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, segments
from nanochat.errors import UserError
from nanochat.files import read_settings, write_json
from nanochat.progress import say

# Held-out text that the metrics are taken on, of each kind, and that the kinds are looked for in.
SEARCHED_BYTES = 64_000_000
MEASURED_BYTES = 2_000_000
MEASURED_KINDS = 20
# Shards that a sample of the training text is spread over, at least.
SPREAD_SHARDS = 16
# tiktoken would fetch these without a deadline; we use them only if they lie in its cache with the right content.
_URL = "https://openaipublic.blob.core.windows.net"
PEERS = {
    "gpt2": ("r50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    "gpt4": ("cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--corpus", required=True, help="folder of the corpus stage")
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments.config, command_settings.TokenizerSettings).tokenizer
    corpus = Corpus.open(arguments.corpus)
    train_bytes = min(settings.train_bytes, corpus.text_bytes("train"))
    say("tokenizer", f"learning {settings.vocab_size:,} entries from {train_bytes / 1e6:,.1f} MB of text")
    started = time.monotonic()
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for text in sample(corpus, settings.train_bytes):
            read += len(text.encode())
            yield text

    merges = learn(counted(), settings.vocab_size)
    train_seconds = time.monotonic() - started
    tokenizer = Tokenizer(merges, corpus.sha256)
    tokenizer.save(arguments.out)
    metrics = measure(tokenizer, corpus)
    write_json(
        Path(arguments.out) / "metrics.json",
        {"vocab_size": tokenizer.vocab_size, **metrics, "train_seconds": train_seconds, "train_bytes": read},
    )
    overall = metrics["bytes_per_token"]["all"]["nanochat"]
    say("tokenizer", f"{overall:.2f} bytes per token on held-out text, learnt in {train_seconds:.1f} s")


def learn(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The bytes of each ordinary token, in rank order. UserError when the text gives fewer than `vocab_size` entries."""
    wanted = vocab_size - len(SPECIAL_TOKENS)
    trainer = rustbpe.Tokenizer()
    # Two ways to the same bytes (aa|a and a|aa) would count twice: learn a few more than needed, keep the first of each.
    trainer.train_from_iterator(
        (part for text in texts for part in segments(text)), wanted + 64, buffer_size=1024, pattern=PATTERN
    )
    ranked = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    merges = list(dict.fromkeys(bytes(token) for token, _ in ranked))
    if len(merges) < wanted:
        raise too_large(vocab_size, len(merges) + len(SPECIAL_TOKENS))
    return merges[:wanted]


def too_large(vocab_size: int, achievable: int, at_most: bool = False) -> UserError:
    """The error for a vocabulary that the text cannot give."""
    return UserError(
        f"tokenizer.vocab_size = {vocab_size}: the training text gives {'at most ' if at_most else ''}"
        f"{achievable:,} entries. Give {achievable} or less, or more text."
    )


def sample(corpus: Corpus, limit_bytes: int) -> Iterator[str]:
    """Training texts of about `limit_bytes` in all, spread evenly over the corpus; all of them when there is no more."""
    shards = corpus.split("train")
    total = sum(shard.text_bytes for shard in shards)
    if total > limit_bytes:
        needed = max(SPREAD_SHARDS, 2 * limit_bytes * len(shards) // total)
        step = max(1, len(shards) // needed)
        shards = shards[::step]
    share = limit_bytes / sum(shard.text_bytes for shard in shards)
    seen = taken = 0
    for shard in shards:
        for document in corpus.shard_documents(shard):
            size = len(document.text.encode())
            seen += size
            if share >= 1 or taken + size <= seen * share:
                taken += size
                yield document.text


def measure(tokenizer: Tokenizer, corpus: Corpus) -> dict:
    """Bytes per token by kind of held-out text, and encode speed of one process."""
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for document in corpus.excerpt("validation", SEARCHED_BYTES, from_shards=32):
        size = sizes.get(document.kind, 0)
        if size < MEASURED_BYTES and (document.kind in texts or len(texts) < MEASURED_KINDS):
            texts.setdefault(document.kind, []).append(document.text)
            sizes[document.kind] = size + len(document.text.encode())
    encodings, missing = peers()
    encoders = {"nanochat": tokenizer.encode, "gpt2": None, "gpt4": None}
    encoders |= {name: encoding.encode_ordinary for name, encoding in encodings.items()}
    counts: dict[str, dict[str, int]] = {kind: {} for kind in texts}
    seconds = 0.0
    for name, encode in encoders.items():
        for kind in texts if encode else ():
            started = time.perf_counter()
            counts[kind][name] = sum(len(encode(part)) for text in texts[kind] for part in segments(text))
            seconds += (time.perf_counter() - started) if name == "nanochat" else 0.0
    ratios = {
        kind: {name: sizes[kind] / counts[kind][name] if name in counts[kind] else None for name in encoders}
        for kind in texts
    }
    totals = {name: sum(count.get(name, 0) for count in counts.values()) for name in encoders}
    ratios["all"] = {name: sum(sizes.values()) / total if total else None for name, total in totals.items()}
    return {
        "bytes_per_token": ratios,
        "missing": missing,
        "encode_bytes_per_second": sum(sizes.values()) / seconds,
        "measured_bytes": sum(sizes.values()),
    }


def peers() -> tuple[dict[str, tiktoken.Encoding], dict[str, str]]:
    """GPT-2's and GPT-4's encodings that can be had without the network, and why the others cannot."""
    found, missing = {}, {}
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    for name, (encoding, digest) in PEERS.items():
        url = f"{_URL}/encodings/{encoding}.tiktoken"
        path = Path(folder) / hashlib.sha1(url.encode()).hexdigest()
        if not folder or not path.is_file():
            missing[name] = f"{encoding} is not in tiktoken's cache ({folder or 'switched off'})"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            missing[name] = f"{path} is not the {encoding} that tiktoken expects"
        else:
            found[name] = tiktoken.get_encoding(encoding)
    return found, missing
