"""The jobs of a run, as `results/jobs/ledger.jsonl` tells them: every attempt, requeued, failed and cancelled ones too.

The newest line of each (job_id, attempt, restart) wins. An attempt without an end is counted until now when it still
runs, until the next attempt of the same work was submitted when it cannot run any more, and until the last line of its log when
that is older than a day. Where the driver was killed, the
job's own `jobs/<folder>/status-<restart>.json` may tell its end.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.report.read import Run, number, text, unix_seconds, whole

# Ended from outside, and went on later from its checkpoint: not a failure of the work.
INTERRUPTED = ("PREEMPTED", "REQUEUED", "TIMEOUT", "SUSPENDED")
FAILED = ("FAILED", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "LOST", "REVOKED")
SILENT_SECONDS = 24 * 3600.0  # without a line in its log no job of this pipeline is alive
FINAL = ("COMPLETED", *INTERRUPTED[:3], *FAILED)

# Rules with a wildcard, and the target that a user knows them by.
TARGETS = {
    "batch_size_plan": "batch_size",
    "make_conversations": "conversations",
    "evaluate_stage": "evaluate",
    "run_benchmark": "benchmark",
}


@dataclass(frozen=True)
class Attempt:
    """One incarnation of one job. Times are unix seconds."""

    rule: str
    wildcards: tuple[str, ...]
    job_id: str
    attempt: int
    restart: int
    partition: str | None
    nodes: str | None
    gpus: int
    gpu_type: str | None
    cpus: int | None
    submitted: float | None
    eligible: float | None
    started: float | None
    ended: float | None
    state: str
    reason: str | None
    exit_code: int | None
    folder: str | None
    log: str | None = None
    silent_since: float | None = None  # when its log was last written
    end_is: str = "recorded"  # recorded | now | bounded | silent | unknown | never started

    @property
    def stage(self) -> str:
        """`base`, or `evaluate sft`."""
        return " ".join((TARGETS.get(self.rule, self.rule), *self.wildcards))

    @property
    def seconds(self) -> float:
        """How long it held its resources."""
        if self.started is None or self.ended is None:
            return 0.0
        return max(0.0, self.ended - self.started)

    @property
    def is_failed(self) -> bool:
        return self.state in FAILED

    @property
    def is_interrupted(self) -> bool:
        return self.state in INTERRUPTED

    @property
    def identity(self) -> tuple[str, int, int]:
        return self.job_id, self.attempt, self.restart


def read_attempts(run: Run, now: float) -> list[Attempt]:
    """Every attempt in the order of submission, each with an end, as far as one can be known."""
    newest: dict[tuple, Attempt] = {}
    foreign = 0
    for line in run.lines("jobs/ledger.jsonl"):
        attempt = _attempt(line)
        if attempt is None:
            foreign += 1
            continue
        newest[attempt.identity] = _kept(attempt, newest.get(attempt.identity))
    if foreign:
        run.note(f"`jobs/ledger.jsonl`: {foreign:,} line{'s' * (foreign > 1)} of an unknown form left out.")
    if not newest:
        run.note("`jobs/ledger.jsonl` is not there or empty: no job times, no cost. Was a stage run by hand?")
    known = [one for attempt in newest.values() for one in _as_the_job_says(run, attempt)]
    known = [replace(one, silent_since=_last_line(run, one)) if one.ended is None else one for one in known]
    ordered = sorted(known, key=lambda one: (one.submitted or one.started or now, one.job_id, one.restart))
    return _with_ends(ordered, now)


def waits(attempts: Iterable[Attempt]) -> dict[tuple, tuple[float | None, float | None]]:
    """Seconds of (queue wait, delay by a requeue) of each attempt, by identity.

    A first start waits from `eligible` (from `submitted` where that is unknown); a requeued one from the end of the
    incarnation before it, and that is counted apart: the user's job had its turn already.
    """
    by_identity = {attempt.identity: attempt for attempt in attempts}
    found: dict[tuple, tuple[float | None, float | None]] = {}
    for identity, attempt in by_identity.items():
        job_id, number_of, restart = identity
        if attempt.started is None:
            found[identity] = (None, None)
            continue
        since = attempt.eligible or attempt.submitted
        before = by_identity.get((job_id, number_of, restart - 1))
        if restart:
            since = before.ended if before is not None else None
        wait = None if since is None else max(0.0, attempt.started - since)
        found[identity] = (None, wait) if restart else (wait, None)
    return found


def busy_seconds(attempts: Iterable[Attempt]) -> float:
    """How long at least one of them ran."""
    spans = sorted((one.started, one.ended) for one in attempts if one.started is not None and one.ended is not None)
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _attempt(line: dict[str, Any]) -> Attempt | None:
    rule, job_id = line.get("rule"), line.get("job_id")
    if not isinstance(rule, str) or not rule or job_id is None or isinstance(job_id, dict | list):
        return None
    wildcards = line.get("wildcards")
    if isinstance(wildcards, dict):
        parts = tuple(str(value) for value in wildcards.values())
    else:
        parts = (str(wildcards),) if wildcards else ()
    cpus, exit_code = number(line.get("cpus")), number(line.get("exit_code"))
    state = str(line.get("state") or "").upper().split()
    return Attempt(
        rule=rule,
        wildcards=parts,
        job_id=str(job_id),
        attempt=whole(line.get("attempt"), 1),
        restart=whole(line.get("restart"), 0),
        partition=text(line.get("partition")),
        nodes=text(line.get("node_names")) or text(line.get("nodes")),
        gpus=whole(line.get("gpus"), 0),
        gpu_type=text(line.get("gpu_type")),
        cpus=None if cpus is None or cpus <= 0 else int(cpus),
        submitted=unix_seconds(line.get("submitted")),
        eligible=unix_seconds(line.get("eligible")),
        started=unix_seconds(line.get("started")),
        ended=unix_seconds(line.get("ended")),
        # SLURM writes "CANCELLED by 0" and, cut to its column, "CANCELLED+".
        state=state[0].rstrip("+,") if state else "UNKNOWN",
        reason=text(line.get("reason")),
        exit_code=None if exit_code is None else int(exit_code),
        folder=text(line.get("folder")),
        log=text(line.get("log")),
    )


def _as_the_job_says(run: Run, attempt: Attempt) -> list[Attempt]:
    """An attempt without a final line, with the end that its job wrote down; and what SLURM requeued while no driver looked."""
    status = _status(run, attempt)
    if not status:
        return [attempt]
    following = replace(attempt, restart=attempt.restart + 1, submitted=None, eligible=None, started=None, nodes=None)
    started, ended = attempt.started or unix_seconds(status.get("started")), unix_seconds(status.get("ended"))
    attempt = replace(attempt, started=started)
    if status.get("state") == "ended" and ended is not None:
        code, kind = number(status.get("exit_code")), text(status.get("kind"))
        state = "COMPLETED" if code == 0 else "REQUEUED" if kind == "checkpointed" else "FAILED"
        exit_code = None if code is None else int(code)
        attempt = replace(attempt, ended=ended, state=state, reason=None if code == 0 else kind, exit_code=exit_code)
    elif started is not None:
        attempt = replace(attempt, state="RUNNING")
    return [attempt, *(_as_the_job_says(run, following) if _status(run, following) else [])]


def _last_line(run: Run, attempt: Attempt) -> float | None:
    """When its log was last written. Both paths of the ledger begin with the folder of results as its driver called it."""
    if not attempt.log or not attempt.folder:
        return None
    try:
        return (run.results / os.path.relpath(attempt.log, Path(attempt.folder).parent.parent)).stat().st_mtime
    except OSError:
        return None


def _status(run: Run, attempt: Attempt) -> dict[str, Any]:
    if attempt.state in FINAL or not attempt.folder:
        return {}
    return run.object(f"jobs/{Path(attempt.folder).name}/status-{attempt.restart}.json")


def _kept(newer: Attempt, older: Attempt | None) -> Attempt:
    """The newer line wins; what it leaves open, and what cannot change any more, stays from the older one."""
    if older is None:
        return newer
    fixed = ("submitted", "eligible", "started", "cpus", "gpu_type", "partition", "nodes")
    return replace(newer, **{name: getattr(older, name) for name in fixed if getattr(newer, name) is None})


def _with_ends(attempts: list[Attempt], now: float) -> list[Attempt]:
    signs: dict[str, list[float]] = defaultdict(list)  # that whatever began earlier had ended by then
    for attempt in attempts:
        # A requeued incarnation was submitted with the first one: only its start is a sign.
        times = [attempt.started, None if attempt.restart else attempt.submitted]
        signs[attempt.stage] += [time for time in times if time is not None] or [now]
    closed = []
    for attempt in attempts:
        if attempt.started is None:
            closed.append(replace(attempt, ended=None, end_is="never started"))
        elif attempt.ended is not None:
            closed.append(replace(attempt, ended=max(attempt.ended, attempt.started)))
        else:
            later = [sign for sign in signs[attempt.stage] if sign > attempt.started]
            if later:
                closed.append(replace(attempt, ended=min(later), end_is="bounded"))
            elif attempt.state in FINAL:
                closed.append(replace(attempt, end_is="unknown"))
            elif attempt.silent_since is not None and now - attempt.silent_since > SILENT_SECONDS:
                closed.append(replace(attempt, ended=max(attempt.silent_since, attempt.started), end_is="silent"))
            else:
                closed.append(replace(attempt, ended=max(now, attempt.started), end_is="now"))
    return closed
