"""`nanochat jobs`: what every job did, live and after the fact; `--follow STAGE` follows its log."""

import argparse
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

from . import exits, ledger, work
from .failures import decide

COLUMNS = ["STAGE", "JOB", "STATE", "ELAPSED", "RESTARTS", "NODE", "GPU-HOURS", "LOG"]
SUCCESSOR_SECONDS = 15.0  # between the last line of an attempt and the first one of its successor lies an `sbatch`


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nanochat jobs", description="List the jobs of a run, from its ledger.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="Folder of the run. Default: %(default)s")
    parser.add_argument("--ledger", type=Path, help="Default: jobs/ledger.jsonl in the folder of the run.")
    parser.add_argument("--all", action="store_true", help="Every attempt, also those that a later one replaced.")
    parser.add_argument("--follow", metavar="STAGE", help="Follow the log of this stage until it ends.")
    arguments = parser.parse_args(argv)
    arguments.ledger = arguments.ledger or arguments.results / "jobs/ledger.jsonl"
    try:
        if arguments.follow:
            return follow(arguments.ledger, arguments.follow)
        records = read(arguments.ledger)
        if not records:
            print(f"{arguments.ledger}: no jobs yet. Another run's are listed with --results FOLDER.", file=sys.stderr)
            return 1
        print(table(records, time.time(), arguments.all))
        return 0
    except (BrokenPipeError, KeyboardInterrupt):
        return 130


def read(path: Path) -> list[dict]:
    """All attempts of a ledger, with their folders and logs where they are as seen from here.

    They are written relative to the driver's working directory. Where that is not ours, the ledger beside the folders tells.
    """
    return [_located(record, path.parent) for record in ledger.read_attempts(path)]


def _located(record: dict, place: Path) -> dict:
    folder = Path(record["folder"] or "/")
    here = place / folder.name
    if folder.is_absolute() or not here.is_dir() or (folder.is_dir() and folder.samefile(here)):
        return record
    log = record["log"]
    if log and not os.path.isabs(log):
        log = os.path.normpath(place / os.path.relpath(log, folder.parent))
    return {**record, "folder": str(here), "log": log}


def table(records: list[dict], now: float, every_attempt: bool = False) -> str:
    """The listing: a line a job, or a line an attempt. Elapsed and GPU-hours of a job are over all of its attempts."""
    groups: dict[object, list[dict]] = {}
    for number, record in enumerate(as_of_now(records)):
        identity = number if every_attempt else work.name_of(record["rule"], record["wildcards"])
        groups.setdefault(identity, []).append(record)
    rows = [COLUMNS]
    for group in groups.values():
        newest = group[-1]
        hours = ledger.gpu_hours(group, now)
        elapsed = sum((record["ended"] or now) - record["started"] for record in group if record["started"])
        rows.append(
            [
                work.name_of(newest["rule"], newest["wildcards"]),
                str(newest["job_id"]),
                _state(newest),
                _clock(elapsed) if elapsed else "-",
                str(newest["restart"] if every_attempt else len(group) - 1),
                ",".join(newest["node_names"] or []) or "-",
                f"{hours:.2f}" if hours else "-",
                newest["log"] or "-",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_of_now(records: list[dict]) -> list[dict]:
    """The records with what the jobs' own files know better than a ledger whose driver is gone: ends, and runs after a requeue.

    What ended without a final line in the ledger is in state ENDED, for the reason that the job gives.
    """
    known = []
    for record in records:
        runs = []
        for restart in _unrecorded_runs(record):
            status = exits.read_status(record["folder"], restart) or {}
            run = {**record, "restart": restart}
            if restart > record["restart"]:
                run |= {"submitted": None, "eligible": None, "started": None}
            run["started"] = run["started"] or status.get("started")
            if status.get("state") == "running":
                run |= {"state": "RUNNING", "reason": None}
            elif status.get("state") == "ended":
                run |= {
                    "state": "ENDED",
                    "reason": status["kind"],
                    "ended": status["ended"],
                    "exit_code": status["exit_code"],
                }
            runs.append(run)
        for run, following in pairwise(runs):
            if run["state"] != "ENDED":  # its end was not for it to tell
                run |= {"state": "REQUEUED", "reason": None, "ended": following["started"]}
        known += runs or [record]
    return known


def _unrecorded_runs(record: dict) -> list[int]:
    """Which runs of a job id have left a status file, from the one on that the ledger has no end of."""
    if not ledger.is_open(record) or not record["folder"]:
        return []
    numbers = [path.stem.removeprefix("status-") for path in Path(record["folder"]).glob("status-*.json")]
    later = {int(number) for number in numbers if number.isdigit() and int(number) > record["restart"]}
    return sorted(later | {record["restart"]})


def _state(record: dict) -> str:
    told = record["state"] in ("PENDING", "ENDED") and record["reason"]
    return f"{record['state']} ({told})" if told else record["state"]


def follow(path: Path, stage: str, poll_seconds: float = 0.5, successor_seconds: float = SUCCESSOR_SECONDS) -> int:
    """Print the log of `stage` as it grows, over its requeues and retries, until it has ended. Exit code 1 if it failed.

    After an end that the driver may answer by submitting the job again, it waits `successor_seconds` for that.
    """

    def newest() -> dict | None:
        named = [record for record in read(path) if stage in _names(record, path.parent.parent)]
        return as_of_now(named)[-1] if named else None

    record = newest()
    if record is None:
        known = sorted({_names(record, path.parent.parent)[-1] for record in read(path)})
        print(f"{path}: no job of {stage} yet; there are: {', '.join(known) or 'none'}", file=sys.stderr)
        return 1
    position, since = 0, -1
    ended, ended_at = None, 0.0
    while True:
        record = newest() or record
        log = Path(record["log"] or "/dev/null")
        try:
            with open(log, errors="replace") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != since or now.st_size < position:  # a new attempt's file, which may have the old number
                    position, since = 0, now.st_ino
                file.seek(position)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                position = file.tell()
        except OSError:
            pass
        known_end = (record["job_id"], record["attempt"], record["restart"], record["state"])
        if _is_over(record):
            if known_end != ended:
                ended, ended_at = known_end, time.monotonic()
            if not _may_follow(record) or time.monotonic() - ended_at >= successor_seconds:
                print(f"[{record['state']}{': ' + record['reason'] if record['reason'] else ''}]", file=sys.stderr)
                return 0 if _is_success(record) else 1
        elif record["state"] == "ENDED" and known_end != ended:
            ended = known_end
            print(f"[{_state(record)}, SLURM may run it again: waiting]", file=sys.stderr)
        time.sleep(poll_seconds)


def _names(record: dict, results: Path) -> list[str]:
    """What a job may be called: its rule, with its wildcards, and as its log lies below the results, `evaluate` or `evaluate/sft`."""
    names = [record["rule"], work.name_of(record["rule"], record["wildcards"])]
    parts = Path(os.path.relpath(record["log"] or "..", results)).with_suffix("").parts
    if ".." in parts:
        return names
    if len(parts) > 1 and parts[-1] == parts[0]:  # base/base.log
        parts = parts[:-1]
    return names + ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _is_over(record: dict) -> bool:
    if record["state"] != "ENDED":
        return not ledger.is_open(record)
    status = exits.read_status(record["folder"], record["restart"]) or {}
    requeued = record["exit_code"] and (status.get("asked") or record["reason"] == "checkpointed")
    return record["cluster"] != "slurm" or not requeued  # SLURM may let it wait for days until it runs again


def _is_success(record: dict) -> bool:
    return record["state"] == "COMPLETED" or (record["state"] == "ENDED" and record["exit_code"] == 0)


def _may_follow(record: dict) -> bool:
    """Whether another attempt may follow this one, which has ended."""
    if _is_success(record):
        return False
    status = exits.read_status(record["folder"], record["restart"]) if record["folder"] else None
    state = "FAILED" if record["state"] == "ENDED" else record["state"]
    answer = decide(state, (status or {}).get("kind"), record["exit_code"], True, {}, record["reason"])
    return answer.action != "give_up"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


if __name__ == "__main__":
    sys.exit(main())
