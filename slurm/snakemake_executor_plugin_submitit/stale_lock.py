"""Snakemake's lock, when the driver that held it is gone.

A driver that was killed leaves its lock, and Snakemake then asks for `--unlock`, since it cannot know whether the holder
still lives. We can: each driver records host, process and start time, and a lock that is older than the record of a dead
process on this host has no holder. Anything less certain (another login node, no record) is left to Snakemake.
"""

import json
import os
import socket
import time
from pathlib import Path

import psutil

SNAKEMAKE_FOLDER = Path(".snakemake")


def record_holder(folder: Path = SNAKEMAKE_FOLDER) -> None:
    """Say who holds the lock; called when a run starts, after Snakemake took it."""
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),
        "time": time.time(),
    }
    path = folder / "holder.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(holder))
    os.replace(temporary, path)


def remove_stale_lock(folder: Path = SNAKEMAKE_FOLDER) -> int | None:
    """Remove the lock of a dead driver; returns its process id, or None when nothing was removed."""
    locks = list((folder / "locks").glob("*.lock"))
    try:
        holder = json.loads((folder / "holder.json").read_text())
        youngest = max((path.stat().st_mtime for path in locks), default=None)
    except (OSError, ValueError):
        return None
    if youngest is None or youngest > holder["time"] or holder["host"] != socket.gethostname() or _alive(holder):
        return None
    for path in locks:
        path.unlink(missing_ok=True)
    return holder["pid"]


def _alive(holder: dict) -> bool:
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder["created"]) < 1
    except psutil.NoSuchProcess:
        return False
