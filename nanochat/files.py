"""Files that are written whole or not at all, checksums, JSON lines.

A job can be killed at any instruction. So nothing is ever written in place: a temporary name in the same folder, fsync,
rename. A reader therefore sees the old file or the new one, and a checksum tells a disk's fault from ours.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from nanochat.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


def unique_suffix() -> str:
    """For names of temporary files: process ids alone repeat from node to node, and always in containers."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on leaving it becomes `path`, and on an exception it is removed.

    The name is unique, so that two writers never share one. The folder is made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{unique_suffix()}.tmp"
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write the file whole."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write the file whole, UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write the file whole, indented, keys in the order given. NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The file's content. Raises UserError that names the file when it is missing or is no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Has the stage that writes it run?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}). Damaged? Remove it and run the stage that writes it again."
        ) from None


def read_settings(path: str | Path, kind: type[Model]) -> Model:
    """Settings of one stage, as the workflow wrote them. Raises UserError when they are not of that kind."""
    if Path(path).suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path}: a command takes the settings of its stage, which the workflow writes: results/config/<stage>.json."
        )
    try:
        return kind.model_validate(read_json(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {key}: {first['msg']}. It must hold {kind.__name__}.") from None


def append_json_line(path: str | Path, content: Any) -> None:
    """Add one line with one write, so that lines of two processes never mix; one that a kill has cut off keeps its own."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(content, allow_nan=False, ensure_ascii=False) + "\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def read_json_lines(path: str | Path) -> list[Any]:
    """All lines but those that a kill has cut off. A missing file has no lines."""
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def sha256(path: str | Path) -> str:
    """Checksum of the file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_checksum(path: str | Path, size_bytes: int, digest: str, listed_in: str | Path) -> None:
    """Raise UserError unless the file has that size and sha256, as `listed_in` says: the one file that Snakemake looks for."""
    path = Path(path)
    remedy = f"Remove {listed_in} and run the workflow again: it makes anew what is missing or damaged."
    if not path.exists():
        raise UserError(f"{path}: missing, but listed in {listed_in}. {remedy}")
    actual = path.stat().st_size
    if actual != size_bytes:
        raise UserError(f"{path}: {actual:,} bytes, {listed_in} says {size_bytes:,}. Written only in part? {remedy}")
    if sha256(path) != digest:
        raise UserError(f"{path}: its sha256 is not the one in {listed_in}. Damaged or replaced? {remedy}")


def sync(path: str | Path) -> None:
    """Make what was written to a file durable, or a rename within a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
