"""Documents out of text files: parquet with a text column, JSON lines, plain text. Nothing is held in memory but a piece.

A file is cut into pieces that can be read side by side: row groups of a parquet, byte ranges of the others. Which
documents come out, and in which order, does not depend on who reads which piece.
"""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".txt")
# What is kept of a source beside the text; conversations about the corpus are made from it.
METADATA = ("title", "president", "author", "date", "year", "description", "topic", "source_url")
# A plain text file has no documents: it is cut at blank lines (else line ends) into ones of about this size.
TXT_DOCUMENT_BYTES = 32_768
RANGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Document:
    """One text, the kind it is counted under, and what else its source says of it."""

    text: str
    kind: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Piece:
    """Part of a file: row groups [start, stop) of a parquet, else the lines that begin in bytes [start, stop)."""

    path: str
    kind: str
    start: int
    stop: int
    text_bytes: int  # an estimate, for sharing out the work


def expand(paths: list[str], setting: str) -> list[Path]:
    """The text files behind files, folders and globs, sorted within each entry, each once. UserError when there is none."""
    if not paths:
        raise UserError(f"{setting} = []: empty. Give files, folders or globs of {', '.join(SUFFIXES)}.")
    found: dict[Path, Path] = {}  # by their true path: one file may be named in several ways
    for entry in paths:
        path = Path(entry).expanduser()
        if any(character in entry for character in "*?[") and not path.exists():
            files = [Path(name) for name in glob.glob(str(path), recursive=True)]
            files = [file for file in files if file.is_file() and file.suffix in SUFFIXES]
            absent = "matches no file"
        elif path.is_dir():
            files = [file for file in _visible_files(path) if file.suffix in SUFFIXES]
            absent = "the folder is empty or holds no file"
        elif path.is_file():
            if path.suffix not in SUFFIXES:
                raise UserError(
                    f"{setting} = {entry!r}: not a text file that can be read. Known: {', '.join(SUFFIXES)}."
                )
            files, absent = [path], ""
        else:
            raise UserError(f"{setting} = {entry!r}: no such file or folder (looked for {path.absolute()}).")
        if not files:
            raise UserError(f"{setting} = {entry!r}: {absent} that ends in {', '.join(SUFFIXES)}.")
        for file in sorted(files):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def passed_over(paths: list[str]) -> list[Path]:
    """Files of the folders in `paths` that are read by nobody, for they end in something else: said, lest they are missed."""
    found = []
    for folder in (Path(entry).expanduser() for entry in paths):
        if folder.is_dir():
            found += [file for file in _visible_files(folder) if file.suffix not in SUFFIXES]
    return sorted(found)


def _visible_files(folder: Path) -> list[Path]:
    """All files below the folder but those with a part of their path, below it, that begins with a dot."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def kind_of(path: Path) -> str:
    """books_pd_00003.parquet and its neighbours are one kind, `books_pd`; text files are of the kind of their folder."""
    if path.suffix == ".txt":
        return path.absolute().parent.name or "text"
    return re.sub(r"[-_.]?\d+(-of-\d+)?$", "", path.stem) or path.stem


def pieces_of(path: Path, text_column: str, kind: str | None = None) -> list[Piece]:
    """Cut one file into pieces. Opens a parquet's footer: UserError when it is damaged or has no such column."""
    kind = kind or kind_of(path)
    if path.suffix == ".parquet":
        with open_parquet(path, text_column) as file:
            # Columns of nested types have several leaves: the place in the schema is not the place in a row group.
            leaf = next(i for i in range(len(file.schema)) if file.schema.column(i).path == text_column)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            sizes = [group.column(leaf).total_uncompressed_size for group in groups]
        return [Piece(str(path), kind, i, i + 1, size) for i, size in enumerate(sizes)]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    starts = range(0, size, RANGE_BYTES)
    return [
        Piece(str(path), kind, start, min(start + RANGE_BYTES, size), min(RANGE_BYTES, size - start))
        for start in starts
    ]


def all_pieces(paths: Iterable[Path], text_column: str) -> list[Piece]:
    """Pieces of all files in their order; the footers are opened side by side, since a shared filesystem is slow to open."""
    with ThreadPoolExecutor(16) as pool:
        return [piece for pieces in pool.map(lambda path: pieces_of(path, text_column), paths) for piece in pieces]


def open_parquet(path: Path, text_column: str) -> pq.ParquetFile:
    """The file with its footer read and the text column found. UserError otherwise."""
    try:
        file = pq.ParquetFile(path, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        size = path.stat().st_size if path.exists() else 0
        raise UserError(
            f"{path}: not a readable parquet file, {size:,} bytes ({reason}). Copied only in part? Copy it again."
        ) from None
    names = file.schema_arrow.names
    if text_column not in names:
        file.close()
        raise UserError(
            f"{path}: corpus.text_column = {text_column!r}: no such column. It has: {', '.join(names) or 'none'}."
        )
    if names.count(text_column) > 1:
        file.close()
        raise UserError(
            f"{path}: corpus.text_column = {text_column!r}: there are {names.count(text_column)} columns of that name."
        )
    kind = file.schema_arrow.field(text_column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        file.close()
        raise UserError(f"{path}: corpus.text_column = {text_column!r}: holds {kind}, not text. Name a string column.")
    return file


def documents(piece: Piece, text_column: str) -> Iterator[Document]:
    """The documents of a piece that hold more than white space. UserError names the file and the place of what is wrong."""
    read = {".parquet": _parquet, ".jsonl": _json_lines, ".txt": _plain}[Path(piece.path).suffix]
    return (document for document in read(piece, text_column) if document.text and not document.text.isspace())


def _parquet(piece: Piece, text_column: str) -> Iterator[Document]:
    path = Path(piece.path)
    with open_parquet(path, text_column) as file:
        names = [name for name in METADATA if file.schema_arrow.names.count(name) == 1 and name != text_column]
        batches = file.iter_batches(
            batch_size=64, row_groups=list(range(piece.start, piece.stop)), columns=[text_column, *names]
        )
        row = 0
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                columns = {name: batch.column(name).to_pylist() for name in (text_column, *names)}
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: row group {piece.start}, after row {row}: text that is not UTF-8 "
                    f"(byte {error.object[error.start]:#04x}). Convert the file to UTF-8."
                ) from None
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise UserError(
                    f"{path}: row group {piece.start} cannot be read ({reason}). Damaged? Copy the file again."
                ) from None
            row += batch.num_rows
            for i, text in enumerate(columns[text_column]):
                found = {name: str(columns[name][i]) for name in names if columns[name][i] is not None}
                yield Document(text or "", piece.kind, found)


def _json_lines(piece: Piece, text_column: str) -> Iterator[Document]:
    for offset, raw in _lines(piece):
        line = _decoded(piece.path, offset, raw)
        if offset == 0:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        where = f"{piece.path}: byte {offset:,}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or str(error).splitlines()[0]
            raise UserError(f"{where}: this line is not JSON ({reason}). Each line must be one JSON object.") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: this line holds a {type(record).__name__}. Each line must be one JSON object.")
        if text_column not in record:
            raise UserError(
                f"{where}: corpus.text_column = {text_column!r}: this line has no such key. It has: {', '.join(record)}."
            )
        text = record[text_column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"{where}: key {text_column!r} holds a {type(text).__name__}. It must be a string.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half of a surrogate pair, which no UTF-8 text can hold. Repair the line."
            ) from None
        found = {name: str(record[name]) for name in METADATA if record.get(name) is not None and name != text_column}
        yield Document(
            text, piece.kind, {name: value.encode(errors="replace").decode() for name, value in found.items()}
        )


def _plain(piece: Piece, text_column: str) -> Iterator[Document]:
    parts: list[str] = []
    size = 0
    for offset, raw in _lines(piece):
        line = _decoded(piece.path, offset, raw).replace("\r\n", "\n")
        if offset == 0:
            line = line.removeprefix("\ufeff")
        blank = not line.strip()
        # At a blank line once there is enough; a text without blank lines is cut where it gets twice as long.
        if parts and ((blank and size >= TXT_DOCUMENT_BYTES) or size >= 2 * TXT_DOCUMENT_BYTES):
            yield Document("".join(parts).strip("\n"), piece.kind, {})
            parts, size = [], 0
        parts.append(line)
        size += len(raw)
    yield Document("".join(parts).strip("\n"), piece.kind, {})


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the piece; a line that crosses its end belongs to it."""
    try:
        with open(piece.path, "rb") as file:
            offset = _line_start(file, piece.start)
            while offset < piece.stop:
                line = file.readline()
                if not line:
                    return
                yield offset, line
                offset += len(line)
    except OSError as error:
        raise UserError(f"{piece.path}: cannot be read: {error.strerror}.") from None


def _line_start(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that begins at or after the offset; the file stands there."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    file.readline()
    return file.tell()


def _decoded(path: str, offset: int, raw: bytes) -> str:
    if raw.count(0) * 4 > len(raw) > 8:  # Latin text in UTF-16 decodes as UTF-8, each other character a null
        raise UserError(
            f"{path}: null bytes at offset {offset + raw.index(0):,}: not UTF-8, or damaged. UTF-16 is converted by: "
            f"iconv -f utf-16le -t utf8."
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8: byte {raw[error.start]:#04x} at offset {offset + error.start:,}. Convert it, for example: "
            f"iconv -f latin1 -t utf8."
        ) from None
