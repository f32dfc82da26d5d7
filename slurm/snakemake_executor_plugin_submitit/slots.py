"""A queue for one machine's GPUs and CPUs: no two jobs on one GPU, whichever driver started them.

A job holds a lock file per GPU for as long as its process lives, so the kernel frees the GPUs of a job that was killed, and
two drivers on one machine agree without knowing of each other. CPUs are shared out in the same way among the jobs of one run.
SLURM does both by itself; only the local executor needs them.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs that this process may use: CUDA_VISIBLE_DEVICES where it is set, else all of the machine."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip() not in ("", "-1", "NoDevFiles")]
    devices = [re.fullmatch(r"nvidia(\d+)", name) for name in os.listdir("/dev")]
    return sorted((match.group(1) for match in devices if match), key=int)


def gpu_folder() -> Path:
    """Where all of a user's jobs on this machine find each other."""
    return Path(tempfile.gettempdir()) / f"gpu-queue-{os.getuid()}"


@contextmanager
def held(count: int, slots: list[str], folder: Path, pause: Callable[[float], None]) -> Iterator[list[str]]:
    """Wait for `count` free ones of `slots` and hold them for the duration of the block; yields the ones received.

    The job at the head of the queue blocks those behind it, so one that needs all of them is not starved by small ones.
    `pause(seconds)` is called between tries and may raise to give up. Raises ValueError when there are not as many.
    """
    if count > len(slots):
        raise ValueError(f"{count} asked for, there are {len(slots)} ({', '.join(slots) or 'none'})")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks: dict[str, int] = {}
    try:
        if count:
            head = _wait(folder / "head", pause)
            try:
                while len(locks) < count:
                    for slot in slots:
                        if len(locks) < count and slot not in locks:
                            lock = _try(folder / re.sub(r"[^\w.-]", "_", slot))
                            if lock is not None:
                                locks[slot] = lock
                    if len(locks) < count:
                        pause(0.2)
            finally:
                os.close(head)
        yield list(locks)
    finally:
        for lock in locks.values():
            os.close(lock)


def _try(path: Path) -> int | None:
    """An open, locked file descriptor, or None when another process holds the lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _wait(path: Path, pause: Callable[[float], None]) -> int:
    while (lock := _try(path)) is None:
        pause(0.2)
    return lock
