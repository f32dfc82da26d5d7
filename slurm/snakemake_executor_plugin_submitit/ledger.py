"""The job ledger: every attempt of every job, in one append-only file of JSON lines.

A run's money is counted from this file, and a restarted driver finds its running jobs in it, so nothing is ever rewritten:
each event (`submitted`, `started`, `ended`) appends one line that holds the whole record as known by then. To read it:

    The newest line of each (job_id, attempt, restart) wins. A line that is not valid JSON (a writer died half-way) is skipped.

    rule, wildcards        what ran; a group of rules is named `group:<id>`
    job_id                 SLURM's id, or a name made from rule and time under the local executor
    attempt                Snakemake's attempt, from 1; a retry of the rule raises it
    restart                how often SLURM requeued this job id, from 0
    cluster                "slurm" or "local"
    partition, nodes, node_names, cpus, gpus, gpu_type   what was asked for, then what was received
    submitted, eligible, started, ended                  unix seconds, null while unknown
    state                  PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, PREEMPTED, NODE_FAIL, REQUEUED, OUT_OF_MEMORY, LOST
    reason                 why it ended or waits, in words, null when there is nothing to say
    exit_code              of the rule's own command, null while it runs or when it was killed before it could be known
    log                    the rule's log file
    event                  what made this line: submitted, started, ended
    folder, pid, key       for the driver: the attempt's files, the local process, a fingerprint of the work
    newest_input           unix seconds by the file system's clock: when the newest of its inputs had changed at submission

GPU-hours are the sum over all records of gpus x (ended - started) / 3600; a record that never started costs nothing.
"""

import errno
import json
import os
from pathlib import Path

FINAL = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "REQUEUED",
    "OUT_OF_MEMORY",
    "LOST",
}

FIELDS = [
    "event",
    "rule",
    "wildcards",
    "job_id",
    "attempt",
    "restart",
    "cluster",
    "partition",
    "nodes",
    "node_names",
    "cpus",
    "gpus",
    "gpu_type",
    "submitted",
    "eligible",
    "started",
    "ended",
    "state",
    "reason",
    "exit_code",
    "log",
    "folder",
    "pid",
    "key",
    "newest_input",
]


def new_record(**known) -> dict:
    """A record with every field, null where not `known`. Raises TypeError on a field that the ledger does not have."""
    unknown = sorted(set(known) - set(FIELDS))
    if unknown:
        raise TypeError(f"ledger: no such field: {', '.join(unknown)}")
    return {**dict.fromkeys(FIELDS), "wildcards": {}, "restart": 0, **known}


def append(path: str | os.PathLike, record: dict) -> None:
    """Append one record as one line, in one write, on disk when this returns. One process writes a ledger: the driver.

    Raises OSError that names the ledger when the line is not there as a whole: a disk or a quota is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, separators=(",", ":")) + "\n"
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = "\n" + line  # the writer before us died half-way: its broken line must not swallow ours
        if os.write(fd, line.encode()) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(fd)
    except OSError as error:  # of a file that is open, Python does not say which
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def read_attempts(path: str | os.PathLike) -> list[dict]:
    """All attempts, one record each, in order of first appearance; empty when there is no ledger yet."""
    attempts: dict[tuple, dict] = {}
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            identity = (record["job_id"], record["attempt"], record["restart"])
        except (ValueError, KeyError, TypeError):
            continue
        attempts[identity] = record
    return list(attempts.values())


def is_open(record: dict) -> bool:
    """Whether nothing final was ever written about this attempt: it runs, waits, or ended while no driver watched."""
    return record.get("state") not in FINAL


def has_open_jobs(folder: str | os.PathLike) -> bool:
    """Whether jobs of this folder's ledger run or wait, as far as a driver knew."""
    return any(is_open(record) for record in read_attempts(Path(folder) / "ledger.jsonl"))


def gpu_hours(records: list[dict], now: float) -> float:
    """GPU-hours charged for these attempts; those still running count until `now` (unix seconds)."""
    seconds = 0.0
    for record in records:
        if record.get("started"):
            seconds += (record.get("gpus") or 0) * max(0.0, (record.get("ended") or now) - record["started"])
    return seconds / 3600
