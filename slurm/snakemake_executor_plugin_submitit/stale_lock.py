"""Snakemake's lock, when the driver that held it is gone.

A driver that was killed leaves its lock files, and Snakemake then asks for `--unlock`, since it cannot know whether the holder
still lives. We can: each driver records host, process and start time beside the lock files that it made, and those of a dead
process on this host have no holder. Anything less certain (another login node, no record) is left to Snakemake. Snakemake
locks files, so that several drivers may live in one folder: each has its own record.
"""

import json
import os
import socket
from pathlib import Path

import psutil

SNAKEMAKE_FOLDER = Path(".snakemake")

# The locks that were there when this run began, before Snakemake took its own; None before anybody looked.
_foreign: dict[str, int] | None = None


def record_holder(folder: Path = SNAKEMAKE_FOLDER) -> None:
    """Say which locks this process holds; called when a run starts, after `remove_stale_lock` and after Snakemake took them.

    A driver that starts in the same second may be counted in: two that name one lock both protect it.
    """
    present = _locks(folder)
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "locks": {} if _foreign is None else dict(present.items() - _foreign.items()),
    }
    path = folder / "holders" / f"{holder['host']}-{holder['pid']}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(holder))
    os.replace(temporary, path)


def remove_stale_lock(folder: Path = SNAKEMAKE_FOLDER) -> int | None:
    """Remove the locks of dead drivers; returns the process id of one of them, or None when nothing was removed."""
    global _foreign
    holders = _holders(folder)  # read before the locks: a holder that appears in between would look as if it had none
    present = _locks(folder)
    gone = {
        path: holder
        for path, holder in holders.items()
        if not holder["locks"].items() & present.items() or _is_dead(holder)
    }
    protected = {lock for path, holder in holders.items() if path not in gone for lock in holder["locks"].items()}
    killed = None
    for path, holder in gone.items():
        for name, made in (holder["locks"].items() & present.items()) - protected:
            lock = folder / "locks" / name
            if _made(lock) == made:  # names come round again
                lock.unlink(missing_ok=True)
                killed = holder["pid"]
        path.unlink(missing_ok=True)
    _foreign = _locks(folder)
    return killed


def is_locked(results: str, folder: Path = SNAKEMAKE_FOLDER) -> bool:
    """Whether a driver, one that may live, has locked files below `results`."""
    for name in _locks(folder):
        try:
            lines = (folder / "locks" / name).read_text().splitlines()
        except OSError:
            continue
        if any(line.startswith(f"{results}/") for line in lines):
            return True
    return False


def _locks(folder: Path) -> dict[str, int]:
    """Name of each lock file -> when it was made, in nanoseconds."""
    made = {path.name: _made(path) for path in (folder / "locks").glob("*.lock")}
    return {name: moment for name, moment in made.items() if moment is not None}


def _made(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _holders(folder: Path) -> dict[Path, dict]:
    found = {}
    for path in (folder / "holders").glob("*.json"):
        try:
            found[path] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    return found


def _is_dead(holder: dict) -> bool:
    """Whether it certainly is; of another host nothing is known."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(holder["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder["created"]) >= 1
    except psutil.NoSuchProcess:
        return True
