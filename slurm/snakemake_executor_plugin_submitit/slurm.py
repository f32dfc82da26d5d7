"""Jobs on a SLURM cluster, through submitit."""

import os
import re
import subprocess
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from . import resources, work
from .failures import NotReached
from .job import Allocation
from .resources import Request
from .status import Observation, SlurmStatus, by_status_file, squeue_environment
from .work import Submission

# What sbatch says when asking again may help; everything else is an answer.
TRANSIENT = re.compile(
    r"unable to contact slurm controller|socket timed out|temporarily unable|resource temporarily unavailable|zero bytes"
    r"|connection (refused|timed out|reset)|transport endpoint|backup controller|communication connection failure"
    r"|slurm_persist_conn|send/recv|rate limit|try again",
    re.IGNORECASE,
)
# As many jobs as the account or the QOS may have: there is room again when one has ended.
FULL = re.compile(r"(Assoc|QOS)\w*MaxSubmitJob\w*")
RETRY_SECONDS = (2, 4, 8, 16, 30, 60, 60, 60)
CANCEL_RETRY_SECONDS = (2, 4, 8)  # less patient: who cancels waits for it
INTERRUPTED_SECONDS = 60  # for sbatch to answer after Ctrl-C
SCANCEL_BATCH = 500
ALREADY_OVER = re.compile(r"invalid job id|already completing or completed", re.IGNORECASE)

# Environment variables of sbatch win over #SBATCH lines. They are named after their option; besides there are, or cannot
# be together with it:
VARIABLES = {
    "array": ("SBATCH_ARRAY_INX",),
    "cpus-per-task": ("SBATCH_CPUS_PER_GPU", "SBATCH_TRES_PER_TASK"),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "switches": ("SBATCH_REQ_SWITCH", "SBATCH_WAIT4SWITCH"),
    "time": ("SBATCH_TIMELIMIT",),
}
# A stage that asks for no GPU gets none, so their number is settled although no line is written.
GPU_VARIABLES = ("SBATCH_GPUS", "SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_SOCKET", "SBATCH_GPUS_PER_TASK")


class SlurmCluster:
    """Submits to, observes and cancels on the cluster that sbatch and SLURM_CONF point at."""

    name = "slurm"

    def __init__(self, logger):
        self.logger = logger
        self.status = SlurmStatus(logger.warning)
        self._told: set[str] = set()
        self._unsure: list[Path] = []  # folders of submissions of which it is not known whether SLURM took them
        # Started from inside a job, the driver must not hand that job's SLURM_CPUS_PER_TASK and the like to its own.
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]

    def check(self, rule: str, request: Request) -> None:
        """Raises ValueError when the request can never be met. What only the cluster knows is the doctor's part."""
        if elsewhere := os.environ.get("SBATCH_CLUSTERS"):
            raise ValueError(
                f"environment: SBATCH_CLUSTERS = {elsewhere!r}: {resources.ONE_CLUSTER}, and unset the variable"
            )

    def submit(self, allocation: Allocation, submission: Submission) -> None:
        """Raises ValueError with SLURM's words when it refuses the job; what is transient is tried again for minutes.

        However it ends without a job id, no job of it may run beside its successor.
        """
        name = work.name_of(submission.rule, submission.record["wildcards"])
        names = [name for name in resources.ENVIRONMENT if name in os.environ]
        parameters = resources.slurm_parameters(submission.request, name, names)
        parameters["comment"] = submission.folder.name  # finds the job again when sbatch's answer is lost
        executor = OwnSlurmExecutor(folder=submission.folder)
        executor._throttling = 0
        executor.update_parameters(**parameters)
        executor.unset = overriding(executor._make_submission_file_text("", ""), os.environ)
        self._tell_ignored(executor.unset)
        self._end_unsure()
        self._unsure.append(submission.folder)
        try:
            submission.record["job_id"] = self._submit(executor, allocation, name, submission)
        except NotReached:
            raise  # nobody to ask: before the next submission
        except ValueError:
            self._unsure.remove(submission.folder)
            raise
        except BaseException:  # Ctrl-C, or a full disk after sbatch's answer
            try:
                self._end_unsure()
            except NotReached as error:
                self.logger.error(f"{error}. A job {name} may be in the queue: look with squeue --me")
            raise
        self._unsure.remove(submission.folder)

    def _submit(self, executor: "OwnSlurmExecutor", allocation: Allocation, name: str, submission: Submission) -> str:
        """The job id. sbatch is asked again only once it is known that SLURM did not take the job after all."""
        asked = False
        for delay in (*RETRY_SECONDS, None):
            try:
                if asked and (job_id := self._find(submission.folder)):
                    _give_pickle(submission.folder, job_id)
                    return job_id
                asked = True
                return _answer(executor, allocation)
            except NotReached as error:
                words, cause = str(error), error
            except (FailedJobError, FailedSubmissionError) as error:
                words, cause = f"sbatch: {_words(str(error))}", error
                if not TRANSIENT.search(words) and not FULL.search(words):
                    raise ValueError(f"rule {submission.rule}: sbatch refused the job: {_words(str(error))}") from error
            if delay is None or FULL.search(words):
                raise NotReached(f"rule {submission.rule}: {words}") from cause
            self.logger.warning(f"{name}: {words}; trying again in {delay} s")
            time.sleep(delay)

    def _end_unsure(self) -> None:
        """Cancel what SLURM took although nobody was told its id. Raises NotReached while that cannot be known."""
        for folder in list(self._unsure):
            job_id = self._find(folder)
            if job_id and self._scancel([job_id]):
                raise NotReached(f"scancel: job {job_id} of an earlier submission goes on")
            self._unsure.remove(folder)

    def _tell_ignored(self, names: tuple[str, ...]) -> None:
        """Say once which variables of the user's sbatch does not get to see."""
        new = [name for name in names if name not in self._told]
        self._told |= set(new)
        if new:
            self.logger.warning(
                f"Not passed on to sbatch, where it would override what the jobs ask for: {', '.join(new)}. "
                "Use the profile's resources instead"
            )

    def _find(self, folder: Path) -> str | None:
        """The id of a job that was accepted although sbatch reported a failure. Raises NotReached when squeue fails."""
        command = ["squeue", "--noheader", "--all", f"--user={os.getuid()}", "--states=all", "-o", "%i|%k"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=squeue_environment())
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotReached(f"squeue: {error}") from error
        if done.returncode:
            raise NotReached(f"squeue: {_words(done.stderr or f'exit code {done.returncode}')}")
        for line in done.stdout.splitlines():
            job_id, _, comment = line.partition("|")
            if comment.strip() == folder.name:
                return job_id.strip()
        return None

    def observe(self, submissions: list[Submission]) -> dict[str, Observation]:
        seen = self.status.observe(submissions)
        lost = [one for one in submissions if one.job_id in seen and seen[one.job_id].state == "LOST"]
        # Should one run where it is not seen, it must not run beside its successor.
        for job_id in self.cancel(lost):
            del seen[job_id]
        return seen

    def ended(self, submissions: list[Submission]) -> dict[str, Observation]:
        """The jobs whose own status files say that they ended, without asking SLURM."""
        seen = {submission.job_id: by_status_file(submission) for submission in submissions}
        return {job_id: observation for job_id, observation in seen.items() if observation}

    def account(self, job_ids: list[str], since: float) -> dict[str, list[Observation]]:
        """What the accounting says of these job ids, one observation per run; empty while it does not answer."""
        return self.status.sacct(job_ids, since) or {}

    def cancel(self, submissions: list[Submission]) -> list[str]:
        """Cancel these jobs. Returns the ids of those that go on because scancel failed, after saying so to the user.

        Such a job may hold GPUs for as long as its walltime lets it: it is not over, and its record has to stay open.
        """
        ids = [submission.job_id for submission in submissions]
        left = []
        for start in range(0, len(ids), SCANCEL_BATCH):
            left += self._scancel(ids[start : start + SCANCEL_BATCH])
        return left

    def _scancel(self, ids: list[str]) -> list[str]:
        """One call of scancel, tried again while it may help; the ids that are not cancelled."""
        for delay in (*CANCEL_RETRY_SECONDS, None):
            words = _scancel_failure(ids)
            if delay is None or not words or not TRANSIENT.search(words):
                break
            self.logger.warning(f"scancel: {_once(words)}; trying again in {delay} s")
            time.sleep(delay)
        left = _not_cancelled(ids, words)
        if left:
            self.logger.error(
                f"{len(left)} of {len(ids)} jobs could not be cancelled and go on: {', '.join(left)}. "
                f"scancel: {_once(words)}\n  Cancel by hand: scancel {' '.join(left)}"
            )
        return left


class OwnSlurmExecutor(submitit.SlurmExecutor):
    """Runs sbatch without the environment variables that would override the job's #SBATCH lines."""

    unset: tuple[str, ...] = ()

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        unset = [word for name in self.unset for word in ("-u", name)]
        # In a session of its own: Ctrl-C is for the driver, which wants to hear the answer.
        return ["setsid", "--wait", "env", *unset, *super()._make_submission_command(submission_file_path)]


def _answer(executor: OwnSlurmExecutor, allocation: Allocation) -> str:
    """sbatch's job id. In a thread, which no Ctrl-C interrupts: only after the answer is there a job to find and to cancel."""
    pool = futures.ThreadPoolExecutor(1)
    answer = pool.submit(executor.submit, allocation)
    try:
        return answer.result().job_id
    finally:
        futures.wait([answer], INTERRUPTED_SECONDS)
        pool.shutdown(wait=False)


def overriding(script: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Variables in `environment` that would override the #SBATCH lines of `script`, or what the plugin says by having none.

    One whose option the script does not set is the user's to set: SBATCH_ACCOUNT without slurm_account, SBATCH_QOS without qos.
    """
    settled = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE))
    settled |= {option.removeprefix("--") for option, resource in resources.OWNED.items() if resource is None}
    names = set(GPU_VARIABLES)
    for option in settled:
        names |= {"SBATCH_" + option.upper().replace("-", "_"), *VARIABLES.get(option, ())}
    if "gpu" in environment.get("SBATCH_GRES", ""):
        names.add("SBATCH_GRES")
    return tuple(sorted(names & set(environment)))


def _scancel_failure(ids: list[str]) -> str:
    """Runs scancel; its words where it failed, else nothing."""
    try:
        done = subprocess.run(["scancel", *ids], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer within 60 s; try again"
    except OSError as error:
        return f"could not be run: {error.strerror}"
    return "" if done.returncode == 0 else _words(done.stderr or f"exit code {done.returncode}")


def _not_cancelled(ids: list[str], words: str) -> list[str]:
    """Which of these jobs scancel's words leave running: those it names, all where it names none or fails as a whole."""
    failures = [line for line in words.split("; ") if line and not ALREADY_OVER.search(line)]
    named = [re.search(r"job id (\d+)", line) for line in failures]
    if all(named):
        return [job_id for job_id in ids if job_id in {match.group(1) for match in named}]
    return ids


def _once(words: str) -> str:
    """scancel's words without the job ids: it says the same of hundreds of jobs."""
    return "; ".join(dict.fromkeys(re.sub(r"Kill job error on job id \S+: ", "", words).split("; ")))


def _words(error: str) -> str:
    """sbatch's own words out of submitit's message, scancel's and squeue's out of what they printed."""
    lines = [
        re.sub(r"^((sbatch|scancel|squeue|slurm_load_jobs): )?(error: )?", "", line).strip()
        for line in error.splitlines()
        if line.strip()
    ]
    said = [line for line in lines if not line.startswith(("Traceback", "subprocess."))]
    return "; ".join(said) or error.strip()


def _give_pickle(folder: Path, job_id: str) -> None:
    """What submitit does after sbatch has answered: put the pickled job where the job looks for it."""
    newest = max(folder.glob("*.pkl"), key=lambda path: path.stat().st_mtime)
    newest.rename(folder / f"{job_id}_submitted.pkl")
