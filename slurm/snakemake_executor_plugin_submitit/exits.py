"""What an exit code means, and how a job tells its driver: the part that both sides of an allocation share."""

import json
import os
from pathlib import Path

USER_ERROR = 2
WRONG_GPUS = 78  # EX_CONFIG of sysexits.h
CHECKPOINTED = 85
CUDA_OUT_OF_MEMORY = 86
LOSS_NOT_FINITE = 87
STALE = 88

KINDS = {
    0: "success",
    USER_ERROR: "user_error",
    WRONG_GPUS: "wrong_gpus",
    CHECKPOINTED: "checkpointed",
    CUDA_OUT_OF_MEMORY: "cuda_out_of_memory",
    LOSS_NOT_FINITE: "loss_not_finite",
    STALE: "stale",
}

MEANING = {
    "user_error": "the input or the settings are wrong; the log's last line says what",
    "wrong_gpus": "the job received other GPUs than it asked for",
    "checkpointed": "it saved a checkpoint and stopped, not finished",
    "cuda_out_of_memory": "the GPU ran out of memory",
    "loss_not_finite": "the loss is not finite",
    "stale": "a newer attempt of the same work has started, so this one ended",
    "no_progress": "it was stopped before it had got any further than the attempt before it: a longer `runtime` is needed",
    "outputs": "the command succeeded, but Snakemake did not accept its outputs",
    "cancelled": "it was cancelled",
    "killed": "it was killed",
    "program": "the program failed",
}


def kind(exit_code: int) -> str:
    """The class of failure (a key of MEANING, or "success") of an exit code as the shell counts them: 128 + n for signal n."""
    if exit_code in KINDS:
        return KINDS[exit_code]
    return "killed" if exit_code in (128 + 9, -9) else "program"


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, also after a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def status_path(folder: str | os.PathLike, restart: int) -> Path:
    """Where the `restart`-th run of a submission leaves its status; each has its own, so a lost one overwrites nothing."""
    return Path(folder) / f"status-{restart}.json"


def read_status(folder: str | os.PathLike, restart: int) -> dict | None:
    """What the job says of itself (see job.py), or None while it has said nothing."""
    return read_json(status_path(folder, restart))


def read_json(path: Path) -> dict | None:
    """What a job left for another to read, or None: a shared file system may fail to answer, which says nothing either."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def is_over(folder: str | os.PathLike, restart: int) -> bool:
    """Whether the job says that its command has ended; the scheduler may know it seconds later."""
    return (read_status(folder, restart) or {}).get("state") == "ended"


def node_exit_path(ranks: Path, node: int) -> Path:
    """Where node `node` of a job on several nodes leaves the exit code of its ranks."""
    return ranks.with_name(f"{ranks.stem}-node-{node}")
