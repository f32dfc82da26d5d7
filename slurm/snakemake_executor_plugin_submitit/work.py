"""What the driver knows of one submitted job, and where its files are.

results/jobs/ledger.jsonl           every attempt, see ledger.py
results/jobs/<rule>-<time>/         one submission: submitit's files, status-<restart>.json, what the inner Snakemake printed
results/jobs/tokens/<work>          the newest attempt's token of each work (a rule with its wildcards)
"""

import hashlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from .failures import Decision
from .resources import Request

KILLED_FOR_MEMORY = re.compile(rb"exceeded memory limit|oom[-_ ]kill|Out Of Memory|Exceeded job memory", re.IGNORECASE)


@dataclass
class Submission:
    """One job id, from submission to its final line in the ledger. `record` is what that line will say."""

    record: dict
    request: Request
    folder: Path
    token_file: Path
    command: str = ""
    resubmitted: dict[str, int] = field(default_factory=dict)  # how often, by kind of failure
    first_submitted: float = field(default_factory=time.time)  # of this job id: from then on accounting has its runs
    last_nodes: list[str] = field(default_factory=list)
    step: int | None = None  # newest training step of the attempts before this one
    notes: dict[str, float] = field(default_factory=dict)  # what was already said to the user, and when
    again: Decision | None = None  # to submit it again, which the cluster has not accepted yet

    @property
    def job_id(self) -> str:
        return self.record["job_id"]

    @property
    def rule(self) -> str:
        return self.record["rule"]

    @property
    def restart(self) -> int:
        return self.record["restart"]

    @property
    def log(self) -> str | None:
        return self.record["log"]


def rule_of(job) -> str:
    """The rule's name, or "group:<id>" for a group of jobs."""
    return f"group:{job.groupid}" if job.is_group() else job.rule.name


def wildcards_of(job) -> dict[str, str]:
    return {} if job.is_group() else dict(job.wildcards_dict)


def name_of(rule: str, wildcards: dict[str, str]) -> str:
    """A name for the work that is safe as a file name and a SLURM job name: "evaluate-sft"."""
    text = "-".join([rule, *(str(value) for value in wildcards.values())])
    safe = re.sub(r"[^\w.]+", "-", text).strip("-")
    return safe if len(safe) <= 80 else f"{safe[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def new_folder(parent: Path, name: str) -> Path:
    """A folder for one submission; private, since the pickled job in it may hold environment variables."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        now = time.time()
        folder = parent / f"{name}-{time.strftime('%m%dT%H%M%S', time.gmtime(now))}{int(now * 1000) % 1000:03d}"
        try:
            folder.mkdir(mode=0o700)
            return folder
        except FileExistsError:
            time.sleep(0.001)


def fingerprint(job) -> str:
    """Tells whether a job found in the ledger is the one that is asked for: same rule, wildcards, outputs and command."""
    parts = [rule_of(job), repr(sorted(wildcards_of(job).items())), *map(str, job.output)]
    if not job.is_group():
        parts.append(str(job.shellcmd))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def newest_input(job) -> float:
    """When the newest of the job's inputs changed, by the clock of its file system; 0 for none."""
    newest = 0.0
    for path in job.input:
        try:
            newest = max(newest, os.stat(path).st_mtime)
        except OSError:
            continue
    return newest


def is_out_of_date(record: dict, job) -> bool:
    """Whether an input of the job changed after `record`, an attempt at the same work, was submitted."""
    known = record.get("newest_input")  # the driver's clock may differ from the file server's
    return newest_input(job) > (record["submitted"] if known is None else known)


def failure_message(submission: Submission, why: str, count: int) -> str:
    """What failed, where its log is, and the last `count` lines of that."""
    record = submission.record
    code = "" if record["exit_code"] is None else f" (exit code {record['exit_code']})"
    name = name_of(submission.rule, record["wildcards"])
    printed = next(iter(sorted(submission.folder.glob("*_log.*"), key=lambda path: -path.stat().st_size)), None)
    log = submission.log if has_written_its_log(submission) else printed
    lines = [f"{name} failed{code}: {why}", f"  job {submission.job_id}, log {log}"]
    if record["node_names"]:
        lines[1] += f", on {', '.join(record['node_names'])}"
    return "\n".join([*lines, *(f"  | {line}" for line in last_lines(log, count))])


def last_lines(path: str | os.PathLike | None, count: int, tail_bytes: int = 16384) -> list[str]:
    """The last complete or incomplete lines of a text file, none when it cannot be read."""
    try:
        with open(path or "", "rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - tail_bytes)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1 if start else 0 :][-count:]


def has_written_its_log(submission: Submission) -> bool:
    """Whether the log is of this submission: one that failed before its command began leaves that of an attempt before it."""
    try:
        written = Path(submission.log or "").stat()
        began = min(path.stat().st_mtime for path in submission.folder.iterdir())  # by the same file system's clock
    except (OSError, ValueError):
        return False
    return bool(written.st_size) and written.st_mtime >= began


def says_out_of_memory(folder: Path) -> bool:
    """Whether SLURM wrote into the job's output that it was killed for its memory; only cgroups tell it in the state."""
    for path in folder.glob("*_log.*"):
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            if KILLED_FOR_MEMORY.search(file.read()):
                return True
    return False
