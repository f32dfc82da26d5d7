"""The state of every SLURM job, from one batched squeue and sacct per cycle.

squeue knows what waits and runs now, and for some minutes what ended; sacct knows the past, one row for each time that a job
was requeued (`-D`), and is what the ledger's times come from. Either may fail or be missing: the other, and the job's own
status file, then have to do. The error taxonomy is in failures.py.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from . import exits
from .work import Submission

WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
ENDED = {  # SLURM's word -> the ledger's
    "COMPLETED": "COMPLETED",
    "FAILED": "FAILED",
    "CANCELLED": "CANCELLED",
    "TIMEOUT": "TIMEOUT",
    "DEADLINE": "TIMEOUT",
    "PREEMPTED": "PREEMPTED",
    "NODE_FAIL": "NODE_FAIL",
    "BOOT_FAIL": "NODE_FAIL",
    "OUT_OF_MEMORY": "OUT_OF_MEMORY",
    "REVOKED": "CANCELLED",
}
# A state that a requeue may follow: only when the job stays away that long is it the end. Seconds.
SETTLES_AFTER = {"PREEMPTED": 300.0, "NODE_FAIL": 60.0, "REQUEUED": 300.0, "missing": 90.0, "unconfirmed": 20.0}

SQUEUE_FIELDS = ("JobID", "State", "Reason", "StartTime", "NodeList", "RestartCnt", "EligibleTime", "EndTime")
SACCT_FIELDS = (
    "JobIDRaw",
    "State",
    "ExitCode",
    "Submit",
    "Eligible",
    "Start",
    "End",
    "NodeList",
    "AllocTRES",
    "Reason",
)
NO_COMMENT_ROW = re.compile(r"^\d+$")  # what a row starts with; anything else continues a broken one

LAUNCH_FAILED = "launch failed requeued held"
# Reasons with which a job waits for ever, although sbatch took it -> what to change.
NEVER_STARTS = {
    "PartitionTimeLimit": "resources.runtime is over the partition's limit: lower it, or use another slurm_partition",
    "PartitionNodeLimit": "resources.nodes is over the partition's limit: lower it, or use another slurm_partition",
    "PartitionConfig": "the partition does not take such a job: check slurm_partition, gpu, mem_mb and threads",
    "InvalidAccount": "slurm_account is not valid here; `sacctmgr show assoc user=$USER` lists yours",
    "AccountNotAllowed": "this partition does not take that slurm_account",
    "InvalidQOS": "qos is not valid for this account and partition",
    "QOSNotAllowed": "this partition does not take that qos",
    "BadConstraints": "no node has what was asked for: check constraint, gpu_model, gpu, mem_mb and threads",
    "DependencyNeverSatisfied": "its dependency failed",
    "JobHeldAdmin": "an administrator holds the job: ask them",
    "JobHeldUser": "the job is held: `scontrol release` would have freed it",
    r"AssocMaxWall\w*": "resources.runtime is over your account's limit",
    r"QOSMaxWallDurationPerJobLimit": "resources.runtime is over the QOS's limit",
    r"(QOS|Assoc)(Grp|Max)?\w*PerJob\w*": "the job alone is over a limit of its QOS or account: ask for less",
}
# Of these, what SLURM says of one partition: with several to choose from, the job waits for another of them.
OF_ONE_PARTITION = re.compile(r"\(?(Partition\w*|AccountNotAllowed|QOSNotAllowed|BadConstraints)\b")


@dataclass
class Observation:
    """What one look says of one job id. `state` is one of the ledger's; times are unix seconds.

    `earlier` are the runs of this job id that ended in a requeue, oldest first; `restart` counts them. `settled`: the times
    are the accounting's own and will not change any more. `launch_failed`: its node would not start it, and SLURM holds it.
    """

    state: str = "PENDING"
    reason: str | None = None
    started: float | None = None
    ended: float | None = None
    eligible: float | None = None
    nodes: list[str] = field(default_factory=list)
    gpu_type: str | None = None
    restart: int = 0
    earlier: list["Observation"] = field(default_factory=list)
    settled: bool = False
    never_starts: str | None = None
    launch_failed: bool = False
    expected_start: float | None = None


class SlurmStatus:
    """Asks squeue and sacct. Calls are counted in `calls`; a command that fails is left alone for a while, then asked again."""

    def __init__(self, warn: Callable[[str], None]):
        self.warn = warn
        self.calls = {"squeue": 0, "sacct": 0}
        self._fields: list[str] | None = None
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._since: dict[tuple[str, int, str], float] = {}  # (job id, restart, state) -> first seen

    def observe(self, submissions: list[Submission]) -> dict[str, Observation]:
        """One look at all jobs. A job of which nothing could be learnt is left out."""
        queue = self.squeue()
        past = self.sacct([submission.job_id for submission in submissions], _earliest(submissions))
        seen = {}
        for submission in submissions:
            row = None if queue is None else queue.get(submission.job_id)
            observation = self._judge(submission, row, queue is not None, (past or {}).get(submission.job_id, []))
            if observation:
                seen[submission.job_id] = observation
        return seen

    def _judge(
        self, submission: Submission, row: dict | None, queue_known: bool, past: list[Observation]
    ) -> Observation | None:
        job_id = submission.job_id
        if row:
            self._since.pop((job_id, submission.restart, "missing"), None)
            now = _from_queue(row)
            if now.never_starts and OF_ONE_PARTITION.match(now.reason) and _has_several_partitions(submission):
                now.never_starts = None
            # A requeued job has a row in sacct for each run; while slurmdbd lags behind, squeue's count is right.
            now.earlier = [run for run in past[: now.restart] if run.state in SETTLES_AFTER or run.ended]
            if len(past) > now.restart and past[now.restart].started and now.state != "PENDING":
                _refine(now, past[now.restart])
        elif past:
            now = past[-1]
            now.earlier, now.restart = past[:-1], len(past) - 1
            if now.state in ("PENDING", "RUNNING"):
                if not queue_known:
                    return by_status_file(submission) or now
                return by_status_file(submission) or self._after(submission, "missing", Observation("LOST"))
        elif queue_known:
            return by_status_file(submission) or self._after(submission, "missing", Observation("LOST"))
        else:
            return by_status_file(submission)
        if now.state in ("PREEMPTED", "NODE_FAIL", "REQUEUED"):
            waiting = Observation("PENDING", f"{now.state}: may be requeued", restart=now.restart, earlier=now.earlier)
            return self._after(submission, now.state, now, waiting)
        if now.state == "FAILED" and (exits.read_status(submission.folder, now.restart) or {}).get("state") != "ended":
            # The status file of a job that ended orderly may reach us late on a shared filesystem.
            return self._after(submission, "unconfirmed", now, Observation("RUNNING", restart=now.restart))
        return now

    def _after(
        self, submission: Submission, state: str, then: Observation, until: Observation | None = None
    ) -> Observation | None:
        """`then` once this run of the job has been in `state` long enough, before that `until`."""
        restart = submission.restart if state == "missing" else then.restart
        first = self._since.setdefault((submission.job_id, restart, state), time.time())
        return then if time.time() - first >= SETTLES_AFTER[state] else until

    def squeue(self) -> dict[str, dict] | None:
        """The user's jobs in the queue, by job id; None when squeue fails."""
        form = ",".join(f"{name}:{255 if name == 'NodeList' else 60}|" for name in SQUEUE_FIELDS)
        text = self._ask("squeue", ["--noheader", "--all", "--states=all", f"--user={os.getuid()}", "-O", form])
        if text is None:
            return None
        rows = {}
        for line in text.splitlines():
            values = [value.strip() for value in line.split("|")]
            if len(values) >= len(SQUEUE_FIELDS):
                rows[values[0]] = dict(zip(SQUEUE_FIELDS, values, strict=False))
        return rows

    def sacct(self, job_ids: list[str], since: float) -> dict[str, list[Observation]] | None:
        """Every run of every job since `since` (unix seconds), oldest first; None when accounting fails or is not there."""
        if self._fields is None:
            known = self._ask("sacct", ["--helpformat"])
            if known is None:
                return None
            self._fields = [name for name in SACCT_FIELDS if name in known.split()]
        start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 60))
        arguments = ["-X", "-D", "-P", "-n", "-S", start, "-j", ",".join(job_ids), "-o", ",".join(self._fields)]
        text = self._ask("sacct", arguments)
        return None if text is None else parse_sacct(text, self._fields)

    def _ask(self, command: str, arguments: list[str]) -> str | None:
        if time.time() < self._not_before.get(command, 0):
            return None
        self.calls[command] += 1
        try:
            done = subprocess.run(
                [command, *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=60,
                env={**squeue_environment(), "SLURM_TIME_FORMAT": "%s"},
            )
            problem = None if done.returncode == 0 else (done.stderr or done.stdout).strip().splitlines()[-1:]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = [str(error)]
        if problem is None:
            if self._failures.pop(command, 0):
                self.warn(f"{command} answers again")
            return done.stdout
        failures = self._failures[command] = self._failures.get(command, 0) + 1
        wait = min(60.0, 2.0 ** min(failures, 6))
        self._not_before[command] = time.time() + wait
        if failures == 1:
            self.warn(f"{command} failed, asking again with growing pauses: {' '.join(problem) or 'no message'}")
        return None


def squeue_environment() -> dict[str, str]:
    """Without the variables by which squeue leaves jobs out: SQUEUE_PARTITION and the like."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}


def _has_several_partitions(submission: Submission) -> bool:
    return "," in (submission.request.partition or os.environ.get("SBATCH_PARTITION", ""))


def by_status_file(submission: Submission) -> Observation | None:
    """The end of a job as it wrote it down itself; None while it goes on, or when SLURM has yet to requeue it."""
    status = exits.read_status(submission.folder, submission.restart)
    if not status or status["state"] != "ended":
        return None
    if status["exit_code"] and (status["asked"] or status["kind"] in ("checkpointed", "killed")):
        return None  # what follows is SLURM's to say: a requeue, or that it was killed for its memory
    state = "COMPLETED" if status["exit_code"] == 0 else "FAILED"
    return Observation(
        state, None, status["started"], status["ended"], nodes=[status["host"]], restart=submission.restart
    )


def parse_sacct(text: str, fields: list[str]) -> dict[str, list[Observation]]:
    """Rows of `sacct -X -D -P -n`, by job id and oldest first. Tolerates rows that a comment broke into several lines."""
    runs: dict[str, list[tuple[float, Observation]]] = {}
    for line in text.splitlines():
        values = line.split("|")
        if len(values) < len(fields) or not NO_COMMENT_ROW.match(values[0]):
            continue
        row = dict(zip(fields, values, strict=False))
        state = _state(row["State"])
        end, start = seconds(row.get("End")), seconds(row.get("Start"))
        observation = Observation(
            state=state,
            reason=_reason(row),
            started=start,
            ended=end,
            eligible=seconds(row.get("Eligible")),
            nodes=expand_nodes(row.get("NodeList", "")),
            gpu_type=_gpu_type(row.get("AllocTRES", "")),
            settled=end is not None and state not in ("PENDING", "RUNNING"),
        )
        # A job that was cancelled while it waited never started; sacct then repeats the end, or names a moment after it.
        if observation.settled and start is not None and not observation.nodes:
            observation.started = None
        runs.setdefault(values[0], []).append((seconds(row.get("Submit")) or 0.0, observation))
    return {
        job_id: [run for _, run in sorted(rows, key=lambda pair: (pair[0], pair[1].ended or float("inf")))]
        for job_id, rows in runs.items()
    }


def never_starts(reason: str) -> str | None:
    """What to change when a job that waits for `reason` will wait for ever; None when it may start."""
    for pattern, advice in NEVER_STARTS.items():
        if re.fullmatch(pattern, reason.strip("()"), re.IGNORECASE):
            return advice
    return None


def seconds(text: str | None) -> float | None:
    """A time as SLURM prints it (unix seconds, else local time) -> unix seconds; None for Unknown, None, N/A."""
    if not text or text in ("Unknown", "None", "N/A", "NONE"):
        return None
    if re.fullmatch(r"\d+", text):
        return float(text) or None
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def expand_nodes(text: str) -> list[str]:
    """ "gpu[1-2,5],login" -> ["gpu1", "gpu2", "gpu5", "login"]; none for "None assigned"."""
    if not text or text.startswith("None") or text == "(null)":
        return []
    from submitit.slurm.slurm import _parse_node_list

    return _parse_node_list(text)


def _from_queue(row: dict) -> Observation:
    state = _state(row["State"])
    start = seconds(row["StartTime"])
    seen = Observation(
        state=state,
        reason=None if row["Reason"] in ("None", "") else row["Reason"],
        started=start if state != "PENDING" else None,
        expected_start=start if state == "PENDING" else None,
        ended=seconds(row["EndTime"]) if state not in ("PENDING", "RUNNING") else None,
        eligible=seconds(row["EligibleTime"]),
        nodes=expand_nodes(row["NodeList"]),
        restart=int(row["RestartCnt"] or 0) if row["RestartCnt"].isdigit() else 0,
    )
    if state == "PENDING" and seen.reason:
        seen.never_starts = never_starts(seen.reason)
        seen.launch_failed = seen.reason.strip("()") == LAUNCH_FAILED
    return seen


def _refine(now: Observation, accounted: Observation) -> None:
    """Take over from accounting what it knows better than the queue."""
    now.started = accounted.started
    now.eligible = accounted.eligible or now.eligible
    now.gpu_type = accounted.gpu_type
    if now.state == "CANCELLED":
        now.reason = accounted.reason or now.reason
    if now.state not in ("PENDING", "RUNNING") and accounted.settled:
        now.ended, now.settled = accounted.ended, True


def _state(text: str) -> str:
    """SLURM's state ("CANCELLED by 0", "NODE_FAIL+") -> the ledger's."""
    word = re.split(r"[ +]", text.strip())[0]
    if word == "REQUEUED":
        return "REQUEUED"
    if word in WAITING:
        return "PENDING"
    if word in RUNNING:
        return "RUNNING"
    return ENDED.get(word, "FAILED")


def _reason(row: dict) -> str | None:
    by = re.match(r"CANCELLED by (\d+)", row["State"])
    if by:
        return f"cancelled by uid {by.group(1)}"
    return None if row.get("Reason") in (None, "", "None") else row["Reason"]


def _gpu_type(tres: str) -> str | None:
    match = re.search(r"gres/gpu:([\w.-]+)=", tres)
    return match.group(1) if match else None


def _earliest(submissions: list[Submission]) -> float:
    return min(submission.first_submitted for submission in submissions)
