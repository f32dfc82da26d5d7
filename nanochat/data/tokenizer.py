"""Byte-level BPE: any Unicode text to token ids and back.

The merges are learnt by rustbpe (`train_tokenizer`), encoding is tiktoken's. Saved as JSON: the split pattern, the bytes of
every merge in rank order, the special tokens behind them. Text is always ordinary: `<|bos|>` written in a document is
encoded letter by letter, special tokens are only ever put in by name.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.errors import UserError
from nanochat.files import read_json, sha256, write_json

# GPT-4's pattern (OpenAI, cl100k_base) with digits in groups of at most two instead of three: fewer of a small vocabulary's
# entries go to numbers.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
FORMAT = 1
# The pattern backtracks over white space; some 500,000 characters of it in one run overflow the regex engine's stack.
LONGEST_SPACE = 100_000
_SPACE = re.compile(
    r"\s+"
)  # greedy, and its length looked at afterwards: a count in the pattern would make long runs quadratic


class Tokenizer:
    """Ordinary tokens have ids 0 to n-1, special tokens follow."""

    def __init__(self, merges: Sequence[bytes], corpus_sha256: str = "", pattern: str = PATTERN, digest: str = ""):
        """merges: the bytes of token i at place i, all 256 single bytes among them."""
        self.merges, self.pattern, self.corpus_sha256, self.sha256 = list(merges), pattern, corpus_sha256, digest
        self.special_tokens = {name: len(merges) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            name="nanochat",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(merges)},
            special_tokens=self.special_tokens,
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json. UserError when it is missing, damaged or changed since it was written."""
        path = Path(folder) / "tokenizer.json"
        content = read_json(path)
        remedy = "Remove it and run the target `tokenizer`."
        try:
            checksum = content.pop("checksum")
            merges = [base64.b64decode(token) for token in content["merges"]]
            specials = content["special_tokens"]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{path}: not a tokenizer of this program. {remedy}") from None
        if checksum != _checksum(content):
            raise UserError(f"{path}: its content does not match its checksum. Changed by hand, or damaged? {remedy}")
        tokenizer = cls(merges, content["corpus_sha256"], content["pattern"], sha256(path))
        if content["format"] != FORMAT or specials != tokenizer.special_tokens:
            raise UserError(f"{path}: written by another version of nanochat-slurm. {remedy}")
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json whole. The same tokenizer always gives the same bytes."""
        path = Path(folder) / "tokenizer.json"
        content = {
            "format": FORMAT,
            "pattern": self.pattern,
            "vocab_size": self.vocab_size,
            "corpus_sha256": self.corpus_sha256,
            "special_tokens": self.special_tokens,
            "merges": [base64.b64encode(token).decode() for token in self.merges],
        }
        write_json(path, {"checksum": _checksum(content), **content})
        self.sha256 = sha256(path)

    @property
    def vocab_size(self) -> int:
        return len(self.merges) + len(SPECIAL_TOKENS)

    @property
    def bos_id(self) -> int:
        return self.special("<|bos|>")

    def special(self, name: str) -> int:
        """Id of a special token, by its whole name such as `<|user_start|>`."""
        return self.special_tokens[name]

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text."""
        if len(text) <= LONGEST_SPACE:
            return self.encoding.encode_ordinary(text)
        return [token for part in segments(text) for token in self.encoding.encode_ordinary(part)]

    def encode_array(self, text: str) -> np.ndarray:
        """(n,) uint32; the same ids as `encode` gives, without a Python object for each."""
        parts = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in segments(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; what is not whole UTF-8 becomes U+FFFD. Special tokens appear by name."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(list(map(int, ids)))

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        return np.array([len(token) for token in self.merges] + [0] * len(SPECIAL_TOKENS), dtype=np.int64)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: bytes of text that each token stands for; 0 for special tokens."""
        return self._token_bytes.copy()

    def require_corpus(self, corpus_sha256: str, folder: str | Path, corpus_folder: str | Path) -> None:
        """UserError unless the merges were learnt from that corpus."""
        if self.corpus_sha256 != corpus_sha256:
            raise UserError(
                f"{Path(folder) / 'tokenizer.json'}: belongs to another run: it was trained on a corpus with sha256 "
                f"{self.corpus_sha256[:12]}, {corpus_folder} has {corpus_sha256[:12]}. Run the target `tokenizer`."
            )


def segments(text: str) -> Iterator[str]:
    """The text in parts that the split pattern can take: nearly always the text itself."""
    if len(text) <= LONGEST_SPACE:
        yield text
        return
    start = 0
    for run in _SPACE.finditer(text):
        for end in range(run.start() + LONGEST_SPACE, run.end() + 1, LONGEST_SPACE):
            yield text[start:end]
            start = end
    if start < len(text) or start == 0:
        yield text[start:]


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
