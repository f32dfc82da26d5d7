"""`nanochat jobs`: what every job did, live and after the fact; `--follow STAGE` follows its log."""

import argparse
import sys
import time
from pathlib import Path

from . import exits, ledger, work

COLUMNS = ["STAGE", "JOB", "STATE", "ELAPSED", "RESTARTS", "NODE", "GPU-HOURS", "LOG"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nanochat jobs", description="List the jobs of a run, from its ledger.")
    parser.add_argument("--ledger", type=Path, default=Path("results/jobs/ledger.jsonl"), help="Default: %(default)s")
    parser.add_argument("--all", action="store_true", help="Every attempt, also those that a later one replaced.")
    parser.add_argument("--follow", metavar="STAGE", help="Follow the log of this stage until it ends.")
    arguments = parser.parse_args(argv)
    try:
        if arguments.follow:
            return follow(arguments.ledger, arguments.follow)
        records = ledger.read_attempts(arguments.ledger)
        if not records:
            print(f"{arguments.ledger}: no jobs yet", file=sys.stderr)
            return 1
        print(table(records, time.time(), arguments.all))
        return 0
    except (BrokenPipeError, KeyboardInterrupt):
        return 130


def table(records: list[dict], now: float, every_attempt: bool = False) -> str:
    """The listing: a line a job, or a line an attempt. Elapsed and GPU-hours of a job are over all of its attempts."""
    groups: dict[object, list[dict]] = {}
    for number, record in enumerate(records):
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


def _state(record: dict) -> str:
    """The state as of now: the job's own file may know more than a ledger whose driver is gone."""
    if ledger.is_open(record) and record["folder"]:
        status = exits.read_status(record["folder"], record["restart"]) or {}
        if status.get("state") == "running":
            return "RUNNING"
        if status.get("state") == "ended":
            return f"ENDED ({status['kind']})"
    if record["state"] == "PENDING" and record["reason"]:
        return f"PENDING ({record['reason']})"
    return record["state"]


def follow(path: Path, stage: str, poll_seconds: float = 0.5) -> int:
    """Print the log of `stage` as it grows, over its requeues and retries, until it has ended. Exit code 1 if it failed."""

    def newest() -> dict | None:
        named = [r for r in ledger.read_attempts(path) if stage in (r["rule"], work.name_of(r["rule"], r["wildcards"]))]
        return named[-1] if named else None

    record = newest()
    if record is None:
        known = sorted({r["rule"] for r in ledger.read_attempts(path)})
        print(f"{path}: no job of {stage} yet; there are: {', '.join(known) or 'none'}", file=sys.stderr)
        return 1
    position, since = 0, -1
    while True:
        record = newest() or record
        log = Path(record["log"] or "/dev/null")
        try:
            inode = log.stat().st_ino
            with open(log, errors="replace") as file:
                if inode != since:  # a new attempt starts a new file
                    position, since = 0, inode
                file.seek(position)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                position = file.tell()
        except OSError:
            pass
        if not ledger.is_open(record):
            print(f"[{record['state']}{': ' + record['reason'] if record['reason'] else ''}]", file=sys.stderr)
            return 0 if record["state"] == "COMPLETED" else 1
        time.sleep(poll_seconds)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


if __name__ == "__main__":
    sys.exit(main())
