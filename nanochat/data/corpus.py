"""Collect the raw text in shards of a bounded size, with a validation split that no training shard holds.

Reads  --config  results/config/corpus.json, and the text that it names
Writes --out     train-00000.parquet, ..., validation-00000.parquet, ..., manifest.json

A document is held out when a hash of its text says so: on every machine the same ones, and all copies of a text on the
same side. The work is cut in units of about one shard; a unit that is done is not done again after an interruption.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from nanochat import command_settings, config
from nanochat.data import huggingface
from nanochat.data.corpus_files import Shard, as_line, read_shard, write_shards
from nanochat.data.parallel import cpus, in_order
from nanochat.data.text_files import SUFFIXES, Document, Piece, all_pieces, documents, expand, passed_over, pieces_of
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, sha256, write_json
from nanochat.progress import Progress, say

BUNDLED = Path(__file__).parent / "bundled" / "sotu.parquet"
# Text compresses to about this share; only for planning, the true sizes are counted.
COMPRESSED_SHARE = 0.4
# Below this, starting worker processes takes longer than the work.
SERIAL_BYTES = 64_000_000
FORMAT = 1


@dataclass(frozen=True)
class Unit:
    """What one worker does in one go: pieces of local files, or one remote file."""

    number: int
    pieces: tuple[Piece, ...] = ()
    remote: huggingface.RemoteFile | None = None

    @property
    def text_bytes(self) -> float:
        return self.remote.size_bytes / COMPRESSED_SHARE if self.remote else sum(p.text_bytes for p in self.pieces)


@dataclass(frozen=True)
class Job:
    """A unit and all that its result depends on."""

    unit: Unit
    folder: str  # where the work lies until all is done
    text_column: str
    seed: int
    threshold: float
    shard_bytes: int
    limit_bytes: int | None = None


@dataclass
class Done:
    """What a unit gave."""

    train: list[Shard] = field(default_factory=list)
    validation: list[Shard] = field(default_factory=list)
    lowest: float = 1.0  # of the documents' hashes

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.train + self.validation)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> None:
    build(read_settings(arguments.config, command_settings.CorpusSettings), Path(arguments.out))


def build(settings: command_settings.CorpusSettings, out: Path) -> None:
    """Make the corpus folder, or say that it is there. Raises UserError for anything wrong with the text."""
    work = out / ".progress"
    key = _key(settings)
    if _complete(out, work, key):
        say("corpus", f"{out}: complete already")
        return
    if _read(work / "key.json") != key:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "key.json", key)
    units, provenance = _plan(settings, work)
    results = _all_units(settings, units, work, settings.corpus.validation_fraction)
    if not any(done.validation for done in results):
        # A handful of documents: hold out the one with the lowest hash.
        results = _all_units(settings, units, work, min((done.lowest for done in results), default=0.0))
    if not any(done.validation for done in results) or not any(done.train for done in results):
        count = sum(shard.documents for done in results for shard in done.train + done.validation)
        if not count:
            limit = settings.corpus.max_bytes
            raise UserError(f"corpus.max_bytes = {limit}: no document fits." if limit else "corpus: holds no text.")
        raise UserError(
            f"corpus.validation_fraction = {settings.corpus.validation_fraction}: of {count} documents that leaves no "
            "training text. Give more documents or a smaller fraction."
        )
    manifest = _publish(settings, results, provenance, out, work)
    write_json(work / "complete.json", {"key": key, "manifest": manifest})
    for path in work.iterdir():
        if path.name not in ("complete.json", "key.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def share_of(text: str, seed: int) -> float:
    """Where the text falls in [0, 1): documents below the validation fraction are held out."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def local_pieces(settings: config.Corpus) -> list[Piece]:
    """Pieces of a source on this machine, in order. UserError when a file is missing or damaged."""
    if settings.source == "bundled":
        return pieces_of(BUNDLED, "text", "sotu")
    return all_pieces(expand(settings.paths, "corpus.paths"), settings.text_column)


def text_column(settings: config.Corpus) -> str:
    return "text" if settings.source == "bundled" else settings.text_column


def _plan(settings: command_settings.CorpusSettings, work: Path) -> tuple[list[Unit], dict]:
    """Units in the order of the source, and where the text is from."""
    corpus = settings.corpus
    if corpus.source == "huggingface":
        # A branch may move on while we are interrupted: all files come from the commit that we began with.
        pinned = _read(work / "source.json") or {"revision": corpus.revision}
        files = huggingface.list_files(corpus.repo_id, corpus.pattern, pinned["revision"])
        write_json(work / "source.json", {"revision": files[0].commit})
        listed = [{"file": file.name, "size_bytes": file.size_bytes} for file in files]
        provenance = {"repo_id": corpus.repo_id, "commit": files[0].commit, "files": listed}
        return [Unit(number, remote=file) for number, file in enumerate(files)], provenance
    pieces = local_pieces(corpus)
    if corpus.source == "directory" and (others := passed_over(corpus.paths)):
        some = ", ".join(str(path) for path in others[:3])
        say(
            "corpus",
            f"passed over, for it reads {', '.join(SUFFIXES)} alone: {len(others):,} files, {some}{', ...' * (len(others) > 3)}",
        )
    groups: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not groups or filled + piece.text_bytes > corpus.shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.text_bytes
    names = list(dict.fromkeys(piece.path for piece in pieces))
    listed = [{"file": Path(name).name, "size_bytes": os.path.getsize(name)} for name in names]
    return [Unit(number, tuple(group)) for number, group in enumerate(groups)], {"files": listed}


def _all_units(
    settings: command_settings.CorpusSettings, units: list[Unit], work: Path, threshold: float
) -> list[Done]:
    """Do the units, up to `max_bytes` of text: the unit that crosses it is done again with what is left."""
    corpus = settings.corpus
    jobs = [Job(unit, str(work), text_column(corpus), settings.seed, threshold, corpus.shard_bytes) for unit in units]
    total = sum(unit.text_bytes for unit in units)
    # A mirror may not tell sizes; then there may be anything behind the names.
    serial = total < SERIAL_BYTES and not any(unit.remote and not unit.remote.size_bytes for unit in units)
    workers = 1 if serial else min(cpus(), len(units))
    progress = Progress("corpus", len(units), "unit")
    results: list[Done] = []
    taken = 0
    for job, done in zip(jobs, in_order(do_unit, jobs, workers), strict=False):
        if corpus.max_bytes and taken + done.text_bytes > corpus.max_bytes:
            done = do_unit(replace(job, limit_bytes=corpus.max_bytes - taken))
            results.append(done)
            break
        results.append(done)
        taken += done.text_bytes
        progress.update(len(results), text=f"{taken / 1e6:,.1f} MB")
    return results


def do_unit(job: Job) -> Done:
    """Write the unit's shards below the work folder and a record of them; a record that is there already is the result."""
    folder, name = Path(job.folder), f"{job.unit.number:05d}"
    record = folder / f"unit-{name}.json"
    key = json.loads(json.dumps(asdict(replace(job, folder=""))))
    known = _read(record)
    if known and known["key"] == key:
        done = Done([Shard(**s) for s in known["train"]], [Shard(**s) for s in known["validation"]], known["lowest"])
        if all(_size(folder / s.file) == s.size_bytes for s in done.train + done.validation):
            return done
    done, held = Done(), folder / f"held-{name}"
    done.train = write_shards(_split(job, done, held), folder, f"train-{name}", "train", job.shard_bytes)
    done.validation = [replace(s, split="validation") for s in done.validation]
    content = {"key": key, "train": [asdict(s) for s in done.train], "validation": [asdict(s) for s in done.validation]}
    write_json(record, {**content, "lowest": done.lowest})
    return done


def _split(job: Job, done: Done, held: Path) -> Iterator[Document]:
    """The training documents of a unit, streamed; the few held-out ones are set aside and written at the end."""
    aside: list[Document] = []
    waiting = 0

    def flush() -> None:
        shards = write_shards(aside, held.parent, f"{held.name}-{len(done.validation)}", "validation", job.shard_bytes)
        done.validation.extend(shards)
        aside.clear()

    for document in _documents(job):
        share = share_of(document.text, job.seed)
        done.lowest = min(done.lowest, share)
        # <=: a threshold that is itself a hash holds that document out.
        if share <= job.threshold:
            aside.append(document)
            waiting += len(document.text)
            if waiting > job.shard_bytes:
                flush()
                waiting = 0
        else:
            yield document
    flush()


def _documents(job: Job) -> Iterator[Document]:
    """All documents of the unit, until `limit_bytes`."""
    pieces: Iterable[Piece] = job.unit.pieces
    fetched: Path | None = None
    if job.unit.remote:
        fetched = huggingface.download(job.unit.remote, Path(job.folder) / "download")
        pieces = pieces_of(fetched, job.text_column)
    taken = 0
    for piece in pieces:
        for document in documents(piece, job.text_column):
            taken += len(document.text.encode())
            if job.limit_bytes is not None and taken > job.limit_bytes:
                return
            yield document
    if fetched:
        # What was read is in the shards; keeping hundreds of gigabytes twice is not wanted.
        fetched.unlink()


def _publish(
    settings: command_settings.CorpusSettings, results: list[Done], provenance: dict, out: Path, work: Path
) -> dict:
    """Give the shards their names, gather the held-out parts in full shards, and write the manifest last."""
    (out / "manifest.json").unlink(missing_ok=True)
    for stale in (*out.glob("train-*.parquet"), *out.glob("validation-*.parquet")):
        stale.unlink()
    parts = [shard for done in results for shard in done.validation]
    held = (document for part in parts for document in read_shard(work / part.file))
    shards = [shard for done in results for shard in done.train]
    shards += write_shards(held, work, "validation", "validation", settings.corpus.shard_bytes)
    lines = []
    numbers = {"train": 0, "validation": 0}
    for shard in shards:
        name = f"{shard.split}-{numbers[shard.split]:05d}.parquet"
        numbers[shard.split] += 1
        os.replace(work / shard.file, out / name)
        lines.append(as_line(shard, name))
    manifest = {
        "format": FORMAT,
        "source": settings.corpus.source,
        "text_column": "text",
        "documents": sum(line["documents"] for line in lines),
        "text_bytes": sum(line["text_bytes"] for line in lines),
        "shards": lines,
        "provenance": provenance,
    }
    write_json(out / "manifest.json", manifest)
    share = sum(line["text_bytes"] for line in lines if line["split"] == "validation") / manifest["text_bytes"]
    say(
        "corpus",
        f"{manifest['documents']:,} documents, {manifest['text_bytes'] / 1e6:,.1f} MB of text in {len(lines)} shards, "
        f"{share:.1%} held out",
    )
    return manifest


def _key(settings: command_settings.CorpusSettings) -> dict:
    """What the result depends on: the settings and the files as they are now. A remote revision is pinned when first seen."""
    key = {"format": FORMAT, "settings": settings.model_dump(mode="json")}
    if settings.corpus.source == "bundled":
        key["files"] = [["sotu.parquet", BUNDLED.stat().st_size]]
    elif settings.corpus.source == "directory":
        files = expand(settings.corpus.paths, "corpus.paths")
        key["files"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return key


def _complete(out: Path, work: Path, key: dict) -> bool:
    """Whether an earlier run with the same key has finished and its shards are whole; the manifest is put back if lost."""
    known = _read(work / "complete.json")
    if not known or known["key"] != key:
        return False
    for line in known["manifest"]["shards"]:
        path = out / line["file"]
        if _size(path) != line["size_bytes"] or sha256(path) != line["sha256"]:
            return False
    if _read(out / "manifest.json") != known["manifest"]:
        write_json(out / "manifest.json", known["manifest"])
    return True


def _read(path: Path) -> dict | None:
    """The JSON file, or None when it is missing or damaged: then the work is simply done again."""
    try:
        return read_json(path)
    except UserError:
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
