"""Jobs on a SLURM cluster, through submitit."""

import os
import re
import subprocess
import time
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from . import resources, work
from .job import Allocation
from .resources import Request
from .status import Observation, SlurmStatus, by_status_file
from .work import Submission

# What sbatch says when asking again may help; everything else is an answer.
TRANSIENT = re.compile(
    r"unable to contact slurm controller|socket timed out|temporarily unable|resource temporarily unavailable|zero bytes"
    r"|connection (refused|timed out|reset)|transport endpoint|backup controller|communication connection failure"
    r"|slurm_persist_conn|send/recv|rate limit|try again",
    re.IGNORECASE,
)
RETRY_SECONDS = (2, 4, 8, 16, 30, 60, 60, 60)
SCANCEL_BATCH = 500


class SlurmCluster:
    """Submits to, observes and cancels on the cluster that sbatch and SLURM_CONF point at."""

    name = "slurm"

    def __init__(self, logger):
        self.logger = logger
        self.status = SlurmStatus(logger.warning)
        # Started from inside a job, the driver must not hand that job's SLURM_CPUS_PER_TASK and the like to its own.
        for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del os.environ[name]

    def check(self, rule: str, request: Request) -> None:
        """Raises ValueError when the request can never be met. What only the cluster knows is the doctor's part."""

    def submit(self, allocation: Allocation, submission: Submission) -> None:
        """Raises ValueError with SLURM's words when it refuses the job; what is transient is tried again for minutes."""
        name = work.name_of(submission.rule, submission.record["wildcards"])
        names = [name for name in resources.ENVIRONMENT if name in os.environ]
        parameters = resources.slurm_parameters(submission.request, name, names)
        parameters["comment"] = submission.folder.name  # finds the job again when sbatch's answer is lost
        executor = submitit.SlurmExecutor(folder=submission.folder)
        executor._throttling = 0
        executor.update_parameters(**parameters)
        for delay in (*RETRY_SECONDS, None):
            try:
                job_id = executor.submit(allocation).job_id
                break
            except (FailedJobError, FailedSubmissionError) as error:
                words = _words(str(error))
                if delay is None or not TRANSIENT.search(words):
                    raise ValueError(f"rule {submission.rule}: sbatch refused the job: {words}") from error
                self.logger.warning(f"{name}: sbatch: {words}; trying again in {delay} s")
                time.sleep(delay)
                job_id = self._find(submission.folder)
                if job_id:
                    _give_pickle(submission.folder, job_id)
                    break
        submission.record["job_id"] = job_id

    def _find(self, folder: Path) -> str | None:
        """The id of a job that was accepted although sbatch reported a failure."""
        command = ["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "-o", "%i|%k"]
        done = subprocess.run(command, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            job_id, _, comment = line.partition("|")
            if comment.strip() == folder.name:
                return job_id.strip()
        return None

    def observe(self, submissions: list[Submission]) -> dict[str, Observation]:
        return self.status.observe(submissions)

    def ended(self, submissions: list[Submission]) -> dict[str, Observation]:
        """The jobs whose own status files say that they ended, without asking SLURM."""
        seen = {submission.job_id: by_status_file(submission) for submission in submissions}
        return {job_id: observation for job_id, observation in seen.items() if observation}

    def account(self, job_ids: list[str], since: float) -> dict[str, list[Observation]]:
        """What the accounting says of these job ids, one observation per run; empty while it does not answer."""
        return self.status.sacct(job_ids, since) or {}

    def cancel(self, submissions: list[Submission]) -> None:
        ids = [submission.job_id for submission in submissions]
        for start in range(0, len(ids), SCANCEL_BATCH):
            for delay in (2, 4, 8, 0):
                done = subprocess.run(["scancel", *ids[start : start + SCANCEL_BATCH]], capture_output=True, text=True)
                if done.returncode == 0 or not TRANSIENT.search(done.stderr):
                    break
                time.sleep(delay)


def _words(error: str) -> str:
    """sbatch's own words out of submitit's message."""
    lines = [
        line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in error.splitlines() if line.strip()
    ]
    said = [line for line in lines if not line.startswith(("Traceback", "subprocess."))]
    return "; ".join(said) or error.strip()


def _give_pickle(folder: Path, job_id: str) -> None:
    """What submitit does after sbatch has answered: put the pickled job where the job looks for it."""
    newest = max(folder.glob("*.pkl"), key=lambda path: path.stat().st_mtime)
    newest.rename(folder / f"{job_id}_submitted.pkl")
