"""A queue for one machine's GPUs: no two jobs on one GPU, whichever driver started them.

A job holds a lock file per GPU for as long as its process lives, so the kernel frees the GPUs of a job that was killed, and
two drivers on one machine agree without knowing of each other. SLURM does this by itself; only the local executor needs it.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def visible() -> list[str]:
    """Identifiers of the GPUs that this process may use: CUDA_VISIBLE_DEVICES where it is set, else all of the machine."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip() not in ("", "-1", "NoDevFiles")]
    devices = [re.fullmatch(r"nvidia(\d+)", name) for name in os.listdir("/dev")]
    return sorted((match.group(1) for match in devices if match), key=int)


@contextmanager
def held(count: int, gpus: list[str], pause: Callable[[float], None]) -> Iterator[list[str]]:
    """Wait for `count` free ones of `gpus` and hold them for the duration of the block; yields the ones received.

    The job at the head of the queue blocks those behind it, so one that needs all GPUs is not starved by small ones.
    `pause(seconds)` is called between tries and may raise to give up.
    """
    if count > len(gpus):
        raise ValueError(f"resources.gpu = {count}: this machine shows {len(gpus)} ({', '.join(gpus) or 'none'})")
    folder = Path(tempfile.gettempdir()) / f"gpu-queue-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks: dict[str, int] = {}
    try:
        if count:
            head = _wait(folder / "head", pause)
            try:
                while len(locks) < count:
                    for gpu in gpus:
                        if len(locks) < count and gpu not in locks:
                            lock = _try(folder / re.sub(r"[^\w.-]", "_", gpu))
                            if lock is not None:
                                locks[gpu] = lock
                    if len(locks) < count:
                        pause(0.5)
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
        pause(0.5)
    return lock
