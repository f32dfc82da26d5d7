"""Encode the corpus once, on CPUs, so that no GPU hour pays for it.

Reads  --config    results/config/tokens.json
       --corpus    results/corpus
       --tokenizer results/tokenizer
Writes --out       train-00000.bin, ... and validation-00000.bin, ... (little-endian uint16, or uint32 above 65,536 entries),
                   a .idx.npy beside each (where its documents start, int64), metrics.json

Every document begins with <|bos|>. One corpus shard gives one token shard; a shard that is done is not done again after an
interruption. The bytes do not depend on how many processes worked.
"""

import argparse
import functools
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nanochat import command_settings
from nanochat.data.corpus_files import Corpus, Shard
from nanochat.data.parallel import cpus, in_order
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, require_checksum, sha256, whole_file, write_json
from nanochat.progress import Progress, say

# Below this, starting worker processes takes longer than the work.
SERIAL_BYTES = 24_000_000
# Above this, checksums are verified beside the reading instead of before it.
VERIFY_FIRST_BYTES = 1_000_000_000
FORMAT = 1


@dataclass(frozen=True)
class TokenShard:
    """A line of metrics.json."""

    file: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """One corpus shard to encode."""

    corpus: str
    tokenizer: str
    out: str
    shard: Shard
    key: dict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--corpus", required=True, help="folder of the corpus stage")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer stage")
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments.config, command_settings.TokensSettings)
    build(arguments.corpus, arguments.tokenizer, arguments.out, settings.tokens.workers)


def build(corpus_folder: str | Path, tokenizer_folder: str | Path, out: str | Path, workers: int = 0) -> dict:
    """Encode all shards with `workers` processes (0: one for each CPU); returns what metrics.json holds."""
    started = time.monotonic()
    corpus, tokenizer = Corpus.open(corpus_folder), Tokenizer.load(tokenizer_folder)
    tokenizer.require_corpus(corpus.sha256, tokenizer_folder, corpus_folder)
    text_bytes = sum(shard.text_bytes for shard in corpus.shards)
    workers = workers or (1 if text_bytes < SERIAL_BYTES else cpus())
    jobs = [
        Job(str(corpus_folder), str(tokenizer_folder), str(out), shard, _key(shard, tokenizer))
        for shard in corpus.shards
    ]
    progress = Progress("tokens", len(jobs), "shard")
    shards: list[TokenShard] = []
    encode_seconds = 0.0
    for shard, seconds in in_order(encode_shard, jobs, min(workers, len(jobs))):
        shards.append(shard)
        encode_seconds += seconds
        progress.update(len(shards), tokens=f"{sum(s.tokens for s in shards):,}")
    _remove_stale(Path(out), shards)
    totals = {split: sum(s.tokens for s in shards if s.split == split) for split in ("train", "validation")}
    metrics = {
        "format": FORMAT,
        "dtype": str(dtype_of(tokenizer.vocab_size)),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "bos_id": tokenizer.bos_id,
        "train_tokens": totals["train"],
        "validation_tokens": totals["validation"],
        "shards": [asdict(shard) for shard in shards],
        "workers": workers,
        "seconds": time.monotonic() - started,
        "encode_seconds": encode_seconds,
        "tokens_per_second": sum(totals.values()) / max(encode_seconds, 1e-9),
    }
    write_json(Path(out) / "metrics.json", metrics)
    say("tokens", f"{totals['train']:,} to train on, {totals['validation']:,} held out, {metrics['dtype']}")
    return metrics


def dtype_of(vocab_size: int) -> np.dtype:
    """Two bytes a token as long as they can name every entry."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def encode_shard(job: Job) -> tuple[TokenShard, float]:
    """Write one token shard, its index and a record; returns it and the seconds it took when it was encoded."""
    out = Path(job.out)
    stem = Path(job.shard.file).stem
    record, path, index = out / ".progress" / f"{stem}.json", out / f"{stem}.bin", out / f"{stem}.idx.npy"
    known = _record(record)
    if known and known["key"] == job.key and path.exists() and index.exists():
        shard = TokenShard(**known["shard"])
        if path.stat().st_size == shard.size_bytes and sha256(path) == shard.sha256:
            return shard, known["seconds"]
    started = time.perf_counter()
    tokenizer = _tokenizer(job.tokenizer)
    dtype = dtype_of(tokenizer.vocab_size)
    arrays, starts, position = [], [], 0
    for document in Corpus.open(job.corpus).shard_documents(job.shard):
        ids = tokenizer.encode_array(document.text)
        starts.append(position)
        arrays += [np.array([tokenizer.bos_id], dtype), ids.astype(dtype)]
        position += 1 + len(ids)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        for array in arrays:
            array.tofile(file)
    with whole_file(index) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array(starts, dtype=np.int64))
    shard = TokenShard(
        path.name, job.shard.split, position, len(starts), job.shard.text_bytes, path.stat().st_size, sha256(path)
    )
    seconds = time.perf_counter() - started
    write_json(record, {"key": job.key, "shard": asdict(shard), "seconds": seconds})
    return shard, seconds


class TokenShards:
    """All tokens of one split as one sequence, memory-mapped; nothing is loaded that is not read."""

    def __init__(self, folder: Path, metrics: dict, shards: list[TokenShard], verify: bool = True):
        self.folder, self.metrics, self.shards = folder, metrics, shards
        self.vocab_size, self.bos_id = metrics["vocab_size"], metrics["bos_id"]
        self.tokenizer_sha256 = metrics["tokenizer_sha256"]
        self.dtype = np.dtype(metrics["dtype"])
        self.bounds = np.cumsum([0] + [shard.tokens for shard in shards])  # (shards + 1,) first token of each
        self._maps: dict[int, np.ndarray] = {}
        self._damage: UserError | None = None
        for shard in shards:
            self._require(shard, shard.size_bytes, checksum=False)
        if verify and sum(shard.size_bytes for shard in shards) <= VERIFY_FIRST_BYTES:
            for shard in shards:
                self._require(shard, shard.size_bytes, checksum=True)
        elif verify:
            self.checking = threading.Thread(target=self._verify, daemon=True, name="token shard checksums")
            self.checking.start()

    @classmethod
    def open(cls, folder: str | Path, split: str, verify: bool = True) -> "TokenShards":
        """The shards of `train` or `validation`. Sizes are checked here, checksums too (beside the reading for a big
        corpus: then a later `read` raises; verify=False where another rank does it). UserError names the file."""
        path = Path(folder) / "metrics.json"
        metrics = read_json(path)
        try:
            shards = [TokenShard(**line) for line in metrics["shards"] if line["split"] == split]
            return cls(Path(folder), metrics, shards, verify)
        except (KeyError, TypeError):
            raise UserError(f"{path}: not the list of token shards. Remove it and run the target `tokens`.") from None

    @property
    def total_tokens(self) -> int:
        return int(self.bounds[-1])

    @property
    def text_bytes(self) -> int:
        """Bytes of UTF-8 that the tokens stand for."""
        return sum(shard.text_bytes for shard in self.shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) tokens from place `start` of the whole sequence, in the shards' dtype; may cross shards."""
        if self._damage:
            raise self._damage
        if not 0 <= start <= start + count <= self.total_tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.total_tokens}")
        parts = []
        shard = int(np.searchsorted(self.bounds, start, side="right")) - 1
        while count > 0:
            offset = start - int(self.bounds[shard])
            part = self._map(shard)[offset : offset + count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def documents(self) -> np.ndarray:
        """(documents,) int64: places in the whole sequence where documents start, at their <|bos|>."""
        starts = [
            np.load((self.folder / shard.file).with_suffix(".idx.npy")) + self.bounds[i]
            for i, shard in enumerate(self.shards)
        ]
        return np.concatenate([np.empty(0, np.int64), *starts])

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self.shards[shard].file, self.dtype, mode="r")
        return self._maps[shard]

    def _require(self, shard: TokenShard, size_bytes: int, checksum: bool) -> None:
        """Size and presence, or the whole checksum, against metrics.json."""
        path, listed = self.folder / shard.file, self.folder / "metrics.json"
        if checksum or not path.exists() or path.stat().st_size != size_bytes:
            require_checksum(path, size_bytes, shard.sha256, listed)
        if shard.tokens * self.dtype.itemsize != size_bytes:
            raise UserError(
                f"{listed}: {shard.file} has {shard.tokens:,} tokens in {size_bytes:,} bytes, which is not {self.dtype}. "
                "Remove it and run the target `tokens`."
            )

    def _verify(self) -> None:
        for shard in self.shards:
            try:
                self._require(shard, shard.size_bytes, checksum=True)
            except UserError as error:
                self._damage = error
                return


def _key(shard: Shard, tokenizer: Tokenizer) -> dict:
    """What a token shard depends on."""
    return {"format": FORMAT, "text": shard.sha256, "tokenizer": tokenizer.sha256}


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    """Loaded once in each worker process."""
    return Tokenizer.load(folder)


def _record(path: Path) -> dict | None:
    try:
        return read_json(path)
    except UserError:
        return None


def _remove_stale(out: Path, shards: list[TokenShard]) -> None:
    """Shards of an earlier, longer corpus must not lie beside the new ones."""
    wanted = {Path(shard.file).stem for shard in shards}
    for pattern in ("*.bin", "*.idx.npy"):
        for path in out.glob(pattern):
            if path.name.split(".")[0] not in wanted:
                path.unlink()
    for path in out.glob(".*.tmp"):  # of an attempt that was killed
        path.unlink(missing_ok=True)
