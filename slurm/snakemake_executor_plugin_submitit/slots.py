"""A queue for one machine's GPUs and CPUs: no two jobs on one GPU, whichever driver started them.

A job holds a lock file per GPU for as long as its process lives, so the kernel frees the GPUs of a job that was killed, and
two drivers on one machine agree without knowing of each other. CPUs are shared out in the same way among the jobs of one run.
SLURM does both by itself; only the local executor needs them.
"""

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
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

    A job leaves to those that came before it every slot that they may use, so one that needs all of them is not starved by
    small ones; those who share no slot do not wait for each other.
    `pause(seconds)` is called between tries and may raise to give up. Raises ValueError when there are not as many.
    """
    if count > len(slots):
        raise ValueError(f"{count} asked for, there are {len(slots)} ({', '.join(slots) or 'none'})")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks: dict[str, int] = {}
    try:
        if count:
            with _queued(slots, folder / "queue") as wanted_before_us:
                while len(locks) < count:
                    wanted = wanted_before_us()
                    for slot in slots:
                        if len(locks) < count and slot not in locks and slot not in wanted:
                            lock = _try(folder / re.sub(r"[^\w.-]", "_", slot))
                            if lock is not None:
                                locks[slot] = lock
                    if len(locks) < count:
                        pause(0.2)
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


@contextmanager
def _queued(slots: Iterable[str], folder: Path) -> Iterator[Callable[[], set[str]]]:
    """Stand in the queue; yields a function that says which slots those in front may use.

    A place in it is a numbered file that lists the slots, and is locked for as long as its owner waits.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "door", "a") as door:
        # One at a time: who takes slots looks only at the numbers before its own, and none of those may come later.
        fcntl.flock(door, fcntl.LOCK_EX)
        number = max(_numbers(folder), default=0) + 1
        place = os.open(folder / str(number), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(place, fcntl.LOCK_EX)
        os.write(place, "\n".join(slots).encode())
    try:
        yield lambda: {slot for before in _numbers(folder) if before < number for slot in _wanted(folder / str(before))}
    finally:
        (folder / str(number)).unlink(missing_ok=True)
        os.close(place)


def _numbers(folder: Path) -> list[int]:
    return [int(name) for name in os.listdir(folder) if name.isdigit()]


def _wanted(place: Path) -> list[str]:
    """The slots of one place in the queue; none, and the place is cleared, when its owner is dead."""
    try:
        with open(place, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().splitlines()
            place.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return []
