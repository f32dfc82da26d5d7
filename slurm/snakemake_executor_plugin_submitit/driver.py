"""The driver's side of all jobs: submit or adopt, look, decide, account.

Nothing here knows Snakemake's scheduler: `Executor` hands in jobs and gets outcomes back.
"""

import copy
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import doctor, exits, ledger, resources, work
from .accounting import CLOSE_SECONDS, Accounting
from .failures import Decision, NotReached, decide
from .job import Allocation, newest_step
from .progress import Progress
from .status import Observation
from .work import Submission

LOG_LINES = 15
NO_NODE_LEFT = "Requested node configuration is not available"
MANY_WAITING = 4  # jobs; more are told as a count


@dataclass
class Outcome:
    """How a job ended, for Snakemake. `final`: a retry would end the same way."""

    success: bool
    message: str = ""
    final: bool = False


class Driver:
    def __init__(self, settings, logger, environment: dict[str, str], cores: int | None = None):
        self.settings = settings
        self.logger = logger
        self.environment = environment
        self.folder = Path(settings.folder).absolute()
        self.ledger = Path(settings.ledger).absolute() if settings.ledger else self.folder / "ledger.jsonl"
        self.workdir = os.getcwd()
        self.cluster = self._cluster(min(cores or os.cpu_count(), os.cpu_count()))
        self.poll_seconds = settings.poll_seconds or (0.25 if self.cluster.name == "local" else 10.0)
        self.progress = Progress(settings.progress == "on")
        self.progress.install(logger)
        self.running: dict[str, Submission] = {}
        self.found: list[tuple[Submission, Observation]] = []  # left behind by a driver that died
        account = self.cluster.account if self.cluster.name == "slurm" else None
        self.accounting = Accounting(self.ledger, account, logger.warning)
        self._asked = self._glanced = float("-inf")
        self._lock = threading.RLock()
        self._recover()

    def _cluster(self, cores: int):
        if self.settings.cluster == "local":
            from .local import LocalCluster

            return LocalCluster(self.settings.gpus, cores, self.settings.grace_seconds)
        if self.settings.cluster == "slurm":
            from .slurm import SlurmCluster

            return SlurmCluster(self.logger)
        raise ValueError(f"--submitit-cluster {self.settings.cluster}: must be local or slurm")

    def check(self, jobs: list) -> None:
        """Raises ValueError naming every job that can never run as it is asked for. Nothing is submitted then."""
        problems, requests = {}, {}
        for job in jobs:
            if job.is_group() or job.is_local:
                continue
            try:
                request = requests[work.rule_of(job)] = self._request(job)
                self.cluster.check(work.rule_of(job), request)
            except ValueError as error:
                problems[str(error)] = None
        if not problems and self.cluster.name == "slurm" and self.settings.doctor == "on":
            for finding in doctor.examine(doctor.Cluster.ask(), requests, self.folder):
                if finding.level == doctor.FATAL:
                    problems[str(finding)] = None
                elif finding.level == doctor.WARNING:
                    self.logger.info(str(finding))
        if problems:
            raise ValueError("\n".join(problems))

    def _request(self, job) -> resources.Request:
        declared = {} if job.is_group() else {key: job.rule.resources.get(key) for key in ("gpu", "nodes")}
        return resources.read(work.rule_of(job), dict(job.resources), job.threads, declared)

    def submit(self, job, command: Callable[[], str]) -> Submission:
        """Adopt the job if it runs already, else submit it. Raises ValueError when it is refused."""
        rule, wildcards, key = work.rule_of(job), work.wildcards_of(job), work.fingerprint(job)
        with self._lock:
            adopted = self._adopt(job, rule, wildcards, key)
        if adopted:
            adopted.command = command()
            return adopted
        request = self._request(job)
        self.cluster.check(rule, request)
        name = work.name_of(rule, wildcards)
        record = ledger.new_record(
            rule=rule,
            wildcards=wildcards,
            attempt=job.attempt,
            cluster=self.cluster.name,
            log=str(job.log[0]) if job.log else None,
            key=key,
            newest_input=work.newest_input(job),
        )
        submission = Submission(record, request, Path(), self.folder / "tokens" / name)
        with self._lock:
            self._submit(submission, name, command())
        return submission

    def _submit(self, submission: Submission, name: str, command: str, reason: dict[str, str] | None = None) -> None:
        """Hand a submission to the cluster under a new job id, and write that down. It stays as it was when that is refused."""
        before = submission
        submission = copy.copy(before)
        request, submission.record = submission.request, dict(before.record)
        submission.folder = work.new_folder(self.folder, name)
        allocation = Allocation(
            command=command,
            folder=str(submission.folder),
            workdir=self.workdir,
            token_file=str(submission.token_file),
            log=str(Path(submission.log).absolute()) if submission.log else None,
            gpus=request.gpus_per_node,
            cpus=request.cpus,
            cluster=self.cluster.name,
            environment={**self.environment, **(reason or {})},
        )
        submission.record |= {
            "event": "submitted",
            "restart": 0,
            "partition": request.partition,
            "nodes": request.nodes,
            "node_names": None,
            "cpus": request.cpus * request.nodes,
            "gpus": request.gpus,
            "gpu_type": request.gpu_model,
            "submitted": time.time(),
            "eligible": None,
            "started": None,
            "ended": None,
            "state": "PENDING",
            "reason": None,
            "exit_code": None,
            "folder": os.path.relpath(submission.folder, self.workdir),
            "pid": None,
        }
        submission.command, submission.first_submitted = command, time.time()
        submission.notes = {}
        self.cluster.submit(allocation, submission)
        submission.record["eligible"] = submission.record["submitted"]
        vars(before).update(vars(submission))
        self.running[before.job_id] = before
        self.accounting.write(before.record)

    def look(self, submissions: list[Submission]) -> dict[str, Outcome]:
        """One look at all jobs; the outcome of those that ended, by the job id they had when this was called.

        Most looks only read the status files of the jobs; the cluster itself is asked every `poll_seconds`.
        """
        with self._lock:
            self.accounting.write_again()
            if time.monotonic() - self._asked >= self.poll_seconds:
                self._asked = time.monotonic()
                left_behind = self._unclaimed()
                asked = [*submissions, *left_behind]
                seen = self.cluster.observe(asked) if asked else {}
                self._account_for(left_behind, seen)
                self.accounting.correct()
            else:
                seen = self.cluster.ended(submissions)
            outcomes = {}
            for submission in submissions:
                job_id = submission.job_id
                if submission.again:
                    outcome = self._resubmit(submission, submission.again)
                    if outcome:
                        outcomes[job_id] = outcome
                elif job_id in seen:
                    outcome = self._advance(submission, seen[job_id])
                    if outcome:
                        outcomes[job_id] = outcome
            return outcomes

    def _advance(self, submission: Submission, seen: Observation) -> Outcome | None:
        """Bring one submission's record up to date; its outcome when it ended for good."""
        self._follow_requeues(submission, seen)
        self._note(submission, seen)
        if seen.never_starts or seen.launch_failed:
            return self._refuse_to_wait(submission, seen)
        if seen.state not in ledger.FINAL:
            return None
        status = exits.read_status(submission.folder, submission.restart) or {}
        self._finish(submission, seen, status)
        self.running.pop(submission.job_id, None)
        if seen.state == "COMPLETED":
            return Outcome(True)
        step = status.get("step") or newest_step(submission.log)
        kind, code = status.get("kind"), status.get("exit_code")
        if code in (None, 128 + 9, 128 + 15) and work.says_out_of_memory(submission.folder):
            kind = "host_out_of_memory"
        further = kind == "checkpointed"  # who tells no steps is believed that it saved
        if step is not None:
            further = step > (submission.step or 0)
        decision = decide(seen.state, kind, code, further, submission.resubmitted, seen.reason)
        if decision.action != "resubmit":
            return Outcome(False, self._message(submission, decision), decision.action == "give_up")
        submission.step = step if step is not None else submission.step
        return self._resubmit(submission, decision)

    def _follow_requeues(self, submission: Submission, seen: Observation) -> None:
        """Close the record of each run that SLURM requeued since the last look, and open the next one."""
        record = submission.record
        while record["restart"] < seen.restart:
            restart = record["restart"]
            status = exits.read_status(submission.folder, restart) or {}
            run = seen.earlier[restart] if restart < len(seen.earlier) else Observation("REQUEUED")
            step = status.get("step")
            submission.step = step if step is not None else submission.step
            record["node_names"] = run.nodes or record["node_names"]  # a launch that fails at once is seen on no node
            self._finish(submission, run, status)
            where = f" on {', '.join(run.nodes)}" if run.nodes else ""
            at = f" at step {step}" if step is not None else ""
            word = run.state.lower().replace("_", " ")
            self._say(f"{submission.rule}: job {submission.job_id} was {word}{where}{at}; SLURM has queued it again")
            record |= {
                "event": "submitted",
                "restart": restart + 1,
                "submitted": run.ended or time.time(),
                "eligible": None,
                "started": None,
                "ended": None,
                "state": "PENDING",
                "reason": None,
                "exit_code": None,
                "node_names": None,
            }
            self.accounting.write(record)

    def _refuse_to_wait(self, submission: Submission, seen: Observation) -> Outcome | None:
        """Cancel a job that would wait for ever; one that a node would not start goes to another node.

        Twice seen, since a reason can be stale for a moment.
        """
        if submission.notes.setdefault("never starts", self._asked) == self._asked:
            return None
        if self._cancel([submission]):
            del submission.notes["never starts"]
            return None
        ended = Observation("CANCELLED", seen.reason, ended=time.time(), restart=submission.restart)
        self._finish(submission, ended, {})
        self.running.pop(submission.job_id, None)
        if seen.launch_failed:
            decision = decide("NODE_FAIL", None, None, False, submission.resubmitted, seen.reason)
            if decision.action == "resubmit":
                return self._resubmit(submission, decision)
            return Outcome(False, self._message(submission, decision), True)
        decision = Decision("give_up", "never_starts", f"it would wait for ever ({seen.reason}): {seen.never_starts}")
        return Outcome(False, self._message(submission, decision), True)

    def _resubmit(self, submission: Submission, decision: Decision) -> Outcome | None:
        """Its outcome when the cluster refuses. A cluster that does not answer is asked again at the next look."""
        count = submission.resubmitted.get(decision.kind, 0) + 1
        old, before = submission.job_id, submission.request
        if decision.avoid_nodes:
            submission.request = submission.request.without_nodes(submission.last_nodes)
        if decision.memory_factor != 1:
            submission.request = submission.request.with_memory(decision.memory_factor)
        # The stage may act on why it runs again: after a CUDA out-of-memory it plans with a larger margin.
        reason = {"ATTEMPT_REASON": decision.kind, "ATTEMPT_REASON_COUNT": str(count)}
        name = work.name_of(submission.rule, submission.record["wildcards"])
        try:
            self._submit(submission, name, submission.command, reason)
        except (NotReached, OSError) as error:  # an OSError: no room for the job's files for the moment
            submission.request, submission.again = before, decision
            self._say(f"{name}: {decision.why}: not submitted again yet: {error}")
            return None
        except ValueError as error:
            submission.request = before
            if decision.avoid_nodes and NO_NODE_LEFT in str(error):
                self._say(f"{name}: there is no node but {', '.join(submission.last_nodes)}")
                return self._resubmit(submission, replace(decision, avoid_nodes=False))
            refused = Decision("give_up", "refused", f"{decision.why}; submitted again, it was refused: {error}")
            return Outcome(False, self._message(submission, refused), True)
        submission.resubmitted[decision.kind], submission.again = count, None
        self._say(f"{name}: {decision.why}: job {old} goes on as job {submission.job_id}")
        return None

    def _note(self, submission: Submission, seen: Observation) -> None:
        """Take over what was seen; a job that started gets its line in the ledger."""
        record = submission.record
        status = exits.read_status(submission.folder, submission.restart) or {}
        started = seen.started or status.get("started")
        record["node_names"] = seen.nodes or record["node_names"]
        earlier = [run.nodes for run in seen.earlier if run.nodes]
        submission.last_nodes = record["node_names"] or (earlier[-1] if earlier else submission.last_nodes)
        record["eligible"] = seen.eligible or record["eligible"]
        record["reason"] = seen.reason
        record["gpu_type"] = status.get("gpu_type") or seen.gpu_type or record["gpu_type"]
        if seen.expected_start:
            record["reason"] = (
                f"{seen.reason}, expected start {time.strftime('%a %H:%M', time.localtime(seen.expected_start))}"
            )
        if seen.state == "RUNNING" and started and record["state"] != "RUNNING":
            record |= {"event": "started", "state": "RUNNING", "started": started, "reason": None}
            self.accounting.write(record)

    def _finish(self, submission: Submission, seen: Observation, status: dict) -> None:
        submission.record |= {
            "event": "ended",
            "state": seen.state,
            "reason": seen.reason or exits.MEANING.get(status.get("kind")),
            # Where accounting has settled it, also that it never started counts.
            "started": seen.started
            or (None if seen.settled else status.get("started") or submission.record["started"]),
            "ended": seen.ended or status.get("ended") or time.time(),
            "exit_code": status.get("exit_code"),
        }
        self.accounting.ended(submission.record, submission.first_submitted, seen.settled)

    def _message(self, submission: Submission, decision) -> str:
        return work.failure_message(submission, decision.why, LOG_LINES)

    def cancel(self) -> None:
        """End all jobs of this driver, and write down how they ended."""
        with self._lock:
            submissions = list(self.running.values())
            self._say(f"Cancelling {len(submissions)} jobs") if submissions else None
            left = self._cancel(submissions)
            for submission in submissions:
                if submission.job_id in left:
                    continue
                status = exits.read_status(submission.folder, submission.restart) or {}
                seen = Observation("CANCELLED", "cancelled with its driver", status.get("started"), status.get("ended"))
                self._finish(submission, seen, status)
            self.running.clear()

    def _cancel(self, submissions: list[Submission]) -> set[str]:
        """Cancel; returns the ids of jobs that go on, which the cluster has named to the user. Their records stay open."""
        return set(self.cluster.cancel(submissions) or ())

    def close(self) -> None:
        """The end of the run."""
        self.progress.clear()
        with self._lock:
            ending = [one for one in self._unclaimed() if exits.is_over(one.folder, one.restart)]
            until = time.monotonic() + CLOSE_SECONDS
            while ending and time.monotonic() < until:
                self._account_for(ending, self.cluster.observe(ending))
                ending = [one for one in ending if ledger.is_open(one.record)]
                time.sleep(1 if ending else 0)
            self.accounting.close()

    def wants_a_look(self) -> bool:
        """Whether a job's own status file says that it ended; reading them is gentle on the cluster, and paced by their number."""
        with self._lock:
            submissions = list(self.running.values())
        if time.monotonic() - self._glanced < max(1.0, len(submissions) / 50):
            return False
        self._glanced = time.monotonic()
        return bool(self.cluster.ended(submissions))

    def show_progress(self) -> None:
        with self._lock:
            submissions = list(self.running.values())
        waiting = [submission for submission in submissions if submission.record["state"] == "PENDING"]
        many = len(waiting) > MANY_WAITING
        jobs = []
        for submission in submissions:
            record, reason = submission.record, submission.record["reason"]
            if record["state"] != "PENDING" or not many:
                says = f"waiting: {reason}" if record["state"] == "PENDING" and reason else None
                name = work.name_of(submission.rule, record["wildcards"])
                jobs.append((name, submission.log, says, record["submitted"]))
        if many:
            reasons = Counter((submission.record["reason"] or "submitted").partition(",")[0] for submission in waiting)
            words = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            jobs.append(("queue", None, f"{len(waiting)} jobs wait: {words}", 0.0))
        self.progress.show(jobs)

    def _say(self, text: str) -> None:
        self.progress.clear()
        self.logger.info(text)

    def _recover(self) -> None:
        """Look at what a driver that died left behind: account for what ended, remember what can be adopted."""
        records = ledger.read_attempts(self.ledger)
        open_records = [record for record in records if ledger.is_open(record)]
        submissions = [
            Submission(record, resources.Request(), Path(self.workdir, record["folder"]), Path())
            for record in open_records
            if record["cluster"] == self.cluster.name and record["folder"] and record["job_id"]
        ]
        for submission in submissions:
            runs = [record["submitted"] for record in records if record["job_id"] == submission.job_id]
            submission.first_submitted = min(runs)
        self.found = [(submission, Observation()) for submission in submissions]
        self._account_for(submissions, self.cluster.observe(submissions) if submissions else {})

    def _unclaimed(self) -> list[Submission]:
        """Jobs of a driver that died which go on, and which nobody has asked for: their work may be done already."""
        return [submission for submission, seen in self.found if seen.state not in ledger.FINAL]

    def _account_for(self, submissions: list[Submission], seen: dict[str, Observation]) -> None:
        """Write down what was seen of jobs that a driver that died has left behind."""
        for submission in submissions:
            observation = seen.get(submission.job_id, Observation())
            self._follow_requeues(submission, observation)
            self._note(submission, observation)
            if observation.state in ledger.FINAL:
                status = exits.read_status(submission.folder, submission.restart) or {}
                self._finish(submission, observation, status)
            self.found = [(one, observation if one is submission else before) for one, before in self.found]

    def _adopt(self, job, rule: str, wildcards: dict, key: str) -> Submission | None:
        """A running or finished job of a dead driver that is exactly this one; others of the same work are cancelled."""
        adopted = None
        for submission, seen in list(self.found):
            record = submission.record
            if (record["rule"], record["wildcards"]) != (rule, wildcards):
                continue
            self.found.remove((submission, seen))
            ended = seen.state in ledger.FINAL
            same = record["key"] == key and not work.is_out_of_date(record, job)
            if same and not adopted and (not ended or _complete(seen, job)):
                adopted = submission
            elif not ended:
                self._say(f"{rule}: job {record['job_id']} of an earlier run is out of date and is cancelled")
                if self._cancel([submission]):
                    self.found.append((submission, seen))
                else:
                    self._finish(submission, Observation("CANCELLED", "out of date"), {})
        if adopted:
            adopted.token_file = self.folder / "tokens" / work.name_of(rule, wildcards)
            adopted.request = self._request(job)
            self.running[adopted.job_id] = adopted
            self._say(f"{rule}: goes on with job {adopted.job_id}, submitted by an earlier run")
        return adopted


def _complete(seen: Observation, job) -> bool:
    return seen.state == "COMPLETED" and all(os.path.exists(path) for path in job.output)
