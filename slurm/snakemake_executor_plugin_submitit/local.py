"""Jobs on this machine, through submitit's local executor."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import submitit

from . import exits, slots
from .job import Allocation
from .resources import Request, said, to_change
from .status import Observation
from .work import Submission

# submitit's default of two minutes would end a training; a local job has no walltime.
A_YEAR_MINUTES = 365 * 24 * 60


class LocalCluster:
    """Submits to, observes and cancels on the machine that the driver runs on."""

    name = "local"

    def __init__(self, gpu_list: str, cores: int, grace_seconds: float):
        self.gpus = (
            slots.visible_gpus() if gpu_list == "all" else [gpu.strip() for gpu in gpu_list.split(",") if gpu.strip()]
        )
        self.cores = cores
        self.grace_seconds = grace_seconds
        self._controllers: dict[str, subprocess.Popen] = {}
        self._seen_alive: dict[str, float] = {}  # job id -> unix seconds

    def check(self, rule: str, request: Request) -> None:
        """Raises ValueError when this machine can never run the job."""
        if request.nodes > 1:
            raise ValueError(
                f"rule {rule}: resources.{said(rule, 'nodes', request.nodes)}: this machine is one; use a SLURM profile"
            )
        if request.gpus > len(self.gpus):
            raise ValueError(
                f"rule {rule}: resources.{said(rule, 'gpu', request.gpus)}: this machine has {len(self.gpus)}"
                f" ({', '.join(self.gpus) or 'none'}). Set {to_change(rule, 'gpu')} to {len(self.gpus)}{' or fewer' if self.gpus else ''}, or use a SLURM profile"
            )

    def submit(self, allocation: Allocation, submission: Submission) -> None:
        submission.record["job_id"] = allocation.job_id = submission.folder.name
        allocation.visible_gpus = self.gpus
        allocation.cpu_slots = [f"cpu-{core}" for core in range(self.cores)]
        allocation.original_cuda_visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        allocation.grace_seconds = self.grace_seconds
        executor = submitit.LocalExecutor(folder=submission.folder)
        executor._throttling = 0  # a queue that is asked gently is a cluster's need
        # Through a shell that ignores Ctrl-C and a lost terminal: the driver cancels, and waits for what is being saved.
        executor.update_parameters(timeout_min=A_YEAR_MINUTES, setup=("trap '' INT HUP",), stderr_to_stdout=True)
        job = executor.submit(allocation)
        # Not the job: submitit's looks for files when it is deleted, and complains when Python is already ending then.
        self._controllers[submission.job_id] = job._process
        submission.record["pid"] = int(job.job_id)

    def observe(self, submissions: list[Submission]) -> dict[str, Observation]:
        return {submission.job_id: self._observe(submission) for submission in submissions}

    def _observe(self, submission: Submission) -> Observation:
        # The order matters: a job that ends between the two looks has written its status before it vanished.
        alive = self._alive(submission)
        if alive:
            self._seen_alive[submission.job_id] = time.time()
        status = exits.read_status(submission.folder, 0) or {}
        seen = Observation(started=status.get("started"), ended=status.get("ended"), nodes=[os.uname().nodename])
        if status.get("state") == "ended":
            seen.state = "COMPLETED" if status["exit_code"] == 0 else "FAILED"
            if status["kind"] == "cancelled":
                seen.state = "CANCELLED"
        elif not alive:
            seen.state, seen.reason = "LOST", "its process vanished"
            seen.ended = self._last_sign_of_life(submission, status)
        elif status.get("state") == "running":
            seen.state = "RUNNING"
        else:
            seen.state = "PENDING"
            seen.reason = "for a free GPU or CPU" if status else None
        return seen

    def _last_sign_of_life(self, submission: Submission, status: dict) -> float:
        """The end of a job that nobody saw end: days may lie between a power cut and the next driver."""
        started = status.get("started") or submission.record["started"] or submission.record["submitted"] or 0.0
        paths = [submission.folder, *submission.folder.glob("*"), *([Path(submission.log)] if submission.log else [])]
        signs = [_modified(path) for path in paths]
        latest = max(started, self._seen_alive.get(submission.job_id, 0.0), *signs)
        if started < psutil.boot_time():
            latest = min(latest, psutil.boot_time())  # what changed a file since then was not the job
        return min(latest, time.time())

    def _alive(self, submission: Submission) -> bool:
        controller = self._controllers.get(submission.job_id)
        if controller is not None:
            return controller.poll() is None
        pids = {submission.record["pid"], (exits.read_status(submission.folder, 0) or {}).get("pid")}
        return any(_belongs(pid, submission.folder) for pid in pids if pid)

    def ended(self, submissions: list[Submission]) -> dict[str, Observation]:
        """Looking is cheap here; only SLURM is asked less often than its jobs' files are read."""
        return {}

    def cancel(self, submissions: list[Submission]) -> None:
        """End jobs with all their processes; trainers get the grace time to save. Returns when they are gone."""
        running = [(submission, processes(submission.folder)) for submission in submissions]
        for submission, _ in running:
            pid = (exits.read_status(submission.folder, 0) or {}).get("pid")
            for process in processes(submission.folder):
                if process.pid == pid:
                    _send(process, signal.SIGTERM)
        end = time.time() + self.grace_seconds + 3
        while time.time() < end and any(processes(submission.folder) for submission in submissions):
            time.sleep(0.1)
        for _, tree in running:
            for process in tree:
                for child in [*_children(process), process]:
                    _send(child, signal.SIGKILL)


def processes(folder: Path) -> list[psutil.Process]:
    """submitit's processes of one submission: its folder, which no other shares, is on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _belongs(pid: int, folder: Path) -> bool:
    """Whether this process is one of the submission's; pids come round again, folders do not."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
