"""The corpus folder: shards of documents and their manifest. One writer, one reader."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.text_files import METADATA, Document
from nanochat.errors import UserError
from nanochat.files import read_json, require_checksum, sha256, whole_file

# Text in a row group: what a reader must hold in memory at once.
ROW_GROUP_BYTES = 8_000_000
EXCERPT_GROUPS = 16  # of a shard that an excerpt is taken from, at most
COLUMNS = ("text", "kind", *METADATA)


@dataclass(frozen=True)
class Shard:
    """A line of the manifest."""

    file: str
    split: str  # train or validation
    documents: int
    text_bytes: int  # UTF-8, before compression
    size_bytes: int  # on disk
    sha256: str


def write_shards(documents: Iterable[Document], folder: Path, name: str, split: str, shard_bytes: int) -> list[Shard]:
    """Write {name}-0.parquet, {name}-1.parquet, ... of at most `shard_bytes` text each (one document at least)."""
    shards: list[Shard] = []
    documents = iter(documents)
    first = next(documents, None)
    while first is not None:
        path = folder / f"{name}-{len(shards)}.parquet"
        with whole_file(path) as temporary:
            count, text_bytes, first = _write_shard(temporary, first, documents, shard_bytes)
        shards.append(Shard(path.name, split, count, text_bytes, path.stat().st_size, sha256(path)))
    return shards


def _write_shard(
    path: Path, first: Document, documents: Iterator[Document], shard_bytes: int
) -> tuple[int, int, Document | None]:
    """Fill one shard; returns its documents, its bytes, and the document that no longer fitted."""
    count = written = pending = 0
    rows: list[dict[str, str]] = []
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=list(COLUMNS[1:])) as writer:
        for document in itertools.chain([first], documents):
            size = len(document.text.encode())
            if count and written + pending + size > shard_bytes:
                break
            if rows and pending + size > ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                written, pending, rows = written + pending, 0, []
            rows.append({**document.metadata, "text": document.text, "kind": document.kind})
            count, pending = count + 1, pending + size
        else:
            document = None
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count, written + pending, document


class Corpus:
    """A corpus folder, read only. Shards are checked against the manifest when they are first opened."""

    def __init__(self, folder: Path, manifest: dict, digest: str):
        self.folder, self.manifest, self.sha256 = folder, manifest, digest
        self._checked: set[str] = set()

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Reads the manifest. UserError when it is missing or is none."""
        path = Path(folder) / "manifest.json"
        manifest = read_json(path)
        try:
            corpus = cls(Path(folder), manifest, sha256(path))
            assert corpus.shards
        except (AssertionError, KeyError, TypeError):
            raise UserError(f"{path}: lists no shards. Remove it and run the target `corpus`.") from None
        return corpus

    @cached_property
    def shards(self) -> list[Shard]:
        return [Shard(**line) for line in self.manifest["shards"]]

    def split(self, split: str) -> list[Shard]:
        """The shards of `train` or `validation`."""
        return [shard for shard in self.shards if shard.split == split]

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.split(split))

    def shard_documents(self, shard: Shard) -> Iterator[Document]:
        """Documents of one shard, a row group in memory at a time. UserError when the shard is not what the manifest says."""
        self._check(shard)
        yield from read_shard(self.folder / shard.file)

    def _check(self, shard: Shard) -> None:
        if shard.file not in self._checked:
            path = self.folder / shard.file
            require_checksum(path, shard.size_bytes, shard.sha256, self.folder / "manifest.json")
            self._checked.add(shard.file)

    def documents(self, split: str) -> Iterator[Document]:
        """All documents of a split, in the order of the shards."""
        for shard in self.split(split):
            yield from self.shard_documents(shard)

    def excerpt(self, split: str, limit_bytes: int, from_shards: int = 8) -> Iterator[Document]:
        """Documents of about `limit_bytes` in all, from row groups spread over shards spread over the corpus; all when there is no more.

        A corpus of several sources has them one after the other: the first documents are of the first source.
        """
        shards = self.split(split)
        if self.text_bytes(split) <= limit_bytes:
            yield from self.documents(split)
            return
        shards = shards[:: max(1, len(shards) // from_shards)]
        for shard in shards:
            self._check(shard)
            share = limit_bytes / len(shards)
            with pq.ParquetFile(self.folder / shard.file) as file:
                count = file.metadata.num_row_groups
                wanted = min(count, EXCERPT_GROUPS)
                groups = [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
                for group in groups:
                    left = share / wanted
                    for document in _row_group(file, group):
                        left -= len(document.text.encode())
                        yield document
                        if left <= 0:
                            break


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of a shard that this package wrote."""
    with pq.ParquetFile(path) as file:
        for group in range(file.metadata.num_row_groups):
            yield from _row_group(file, group)


def _row_group(file: pq.ParquetFile, group: int) -> Iterator[Document]:
    for row in file.read_row_group(group).to_pylist():
        text, kind = row.pop("text"), row.pop("kind")
        yield Document(text, kind, {name: value for name, value in row.items() if value is not None})


def as_line(shard: Shard, file: str) -> dict:
    """The manifest's line of a shard under its final name."""
    return {**asdict(shard), "file": file}
