"""What runs inside an allocation: the command, its signals, its true exit code, and the requeue.

submitit starts an `Allocation` there. It runs the command (an inner Snakemake that runs one rule) as a child in its own
session and tells the driver about it in a status file, because the inner Snakemake always exits 1:

    state       waiting (for a GPU or a CPU), running, ended
    pid, host, gpus, gpu_type, token, restart
    started, ended     unix seconds; `started` is when the command started, not when the wait for a GPU did
    exit_code, kind    of the rule's own command, see exits.py; known before the last of its processes is gone
    step               the newest `step N` of the log: tells whether a walltime was reached with or without progress
    asked              the signal that asked it to stop, if one did

Signals. A preemption sends SIGTERM, a walltime SIGUSR2 (some seconds before the end). Both are passed on to every process of the
job; whoever trains saves and exits 85. What follows then differs:
- SIGUSR2: requeue this job, and wait for the end that SLURM brings with it.
- SIGTERM: SLURM requeues a preempted job only while it runs: wait to be killed, since exit 0 would end it as COMPLETED.
The shells and the inner Snakemake between us and the trainer must outlive the signals, or the rule's outputs are removed
while the trainer still saves: SIGUSR2 is ignored in the whole tree unless a program handles it, each bash traps SIGTERM,
and the inner Snakemake does not answer it (sigterm.py).
"""

import ctypes
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from . import exits, slots

LOOK_SECONDS = (
    5.0  # between looks at the token: what two writers can overlap at most, for a command that does not look itself
)
KILLED_WITHIN_SECONDS = 900.0  # longest grace time of a preemption that we wait out
EXIT_GRACE_SECONDS = 2.0  # for what a finished command left running
STEP = re.compile(rb"\bstep\s+(\d+)")

BASH_SETUP = """\
# Read by each bash of the job through BASH_ENV: keeps the true exit code, and outlives the signals of a preemption.
export BASH_ENV={previous}
[ -n "$BASH_ENV" ] && [ -r "$BASH_ENV" ] && . "$BASH_ENV"
[ -n "$BASH_ENV" ] || unset BASH_ENV
trap : TERM
SUBMITIT_EXIT_CODES={exit_codes}
trap 'echo $? >> "$SUBMITIT_EXIT_CODES"' EXIT
"""


@dataclass
class Status:
    job_id: str
    restart: int
    token: str
    state: str = "waiting"
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=lambda: os.environ.get("SLURMD_NODENAME") or os.uname().nodename)
    gpus: list[str] = field(default_factory=list)
    gpu_type: str | None = None
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    kind: str | None = None
    step: int | None = None
    asked: str | None = None


class GivenUp(Exception):
    """Asked to stop while still waiting for a GPU."""


@dataclass
class Allocation:
    """One submission of one job. submitit pickles it and calls it inside the allocation, again after every requeue.

    command        shell command line
    folder         where this submission keeps its files
    token_file     newest token of this work (rule and wildcards), whichever submission it belongs to
    log            the rule's log file, read for its newest step
    gpus, cpus     asked for on this node
    cluster        "slurm" or "local"
    visible_gpus, cpu_slots   local: what may be handed out
    grace_seconds  local: between the request to stop and SIGKILL
    """

    command: str
    folder: str
    workdir: str
    token_file: str
    log: str | None = None
    gpus: int = 0
    cpus: int = 1
    cluster: str = "local"
    job_id: str = ""
    visible_gpus: list[str] = field(default_factory=list)
    cpu_slots: list[str] = field(default_factory=list)
    original_cuda_visible_devices: str | None = None
    grace_seconds: float = 10.0
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> dict:
        if self.cluster == "local":
            os.setsid()  # Ctrl-C is for the driver: it asks us, and waits for what is being saved
        signals = Signals()
        _adopt_orphans()
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0) if self.cluster == "slurm" else 0
        if self.cluster == "slurm" and int(os.environ.get("SLURM_PROCID") or 0) > 0:
            return self._help(restart, signals)
        job_id = os.environ["SLURM_JOB_ID"] if self.cluster == "slurm" else self.job_id
        status = Status(job_id, restart, new_token(self.token_file, job_id, restart))
        self._write(status)
        if any((exits.read_status(self.folder, run) or {}).get("exit_code") == 0 for run in range(restart)):
            self._end(status, 0)  # requeued after it had succeeded: a second run would remove what others read by now
        elif self.cluster == "slurm":
            status.gpus = _received_gpus()
            if len(status.gpus) < self.gpus:
                self._end(status, exits.WRONG_GPUS)
            else:
                self._run(status, signals)
        else:
            try:
                with (
                    slots.held(self.gpus, self.visible_gpus, slots.gpu_folder(), signals.pause) as status.gpus,
                    slots.held(min(self.cpus, len(self.cpu_slots)), self.cpu_slots, self._cpu_folder, signals.pause),
                ):
                    self._run(status, signals)
            except GivenUp:
                self._end(status, 128 + signal.SIGTERM, "cancelled")
        if status.exit_code:
            # Not an error of submitit's: the driver reads the status, and sacct shows the command's own exit code.
            raise SystemExit(status.exit_code)
        return asdict(status)

    def _help(self, restart: int, signals: "Signals") -> dict:
        """The part of the second and further nodes: run the ranks that `nanochat-launch` asks for on the first one.

        A nested srun would do it too, but it answers the SIGTERM of a preemption by killing all ranks at once.
        """
        node = int(os.environ["SLURM_PROCID"])
        plan = ranks_path(self.folder, restart)
        ranks, told = None, False
        while (exits.read_status(self.folder, restart) or {}).get("state") != "ended":
            if ranks is None and (asked := exits.read_json(plan)):
                own = {name: value for name, value in os.environ.items() if name.startswith(("SLURM", "CUDA_VISIBLE"))}
                ranks = subprocess.Popen(
                    asked["command"],
                    cwd=self.workdir,
                    env={**asked["environment"], **own},
                    start_new_session=True,
                    preexec_fn=_child_signals,
                )
            for received in signals.wait(1.0):
                _signal_all(_descendants(), received)
            if ranks and ranks.poll() is not None and not told:
                exits.write_whole(exits.node_exit_path(plan, node), str(ranks.returncode))
                told = True
        _end_descendants(EXIT_GRACE_SECONDS)
        return {}

    @property
    def _cpu_folder(self) -> Path:
        return Path(self.token_file).parent.parent / "cpu-slots"

    def _run(self, status: Status, signals: "Signals") -> None:
        """Run the command to its end and, on SLURM, bring about the requeue that follows a checkpoint."""
        previous = exits.read_status(self.folder, status.restart - 1) or {}
        exit_codes = Path(self.folder) / f"exit-codes-{status.restart}"
        status.state, status.started = "running", time.time()
        status.gpu_type = _gpu_type() if status.gpus else None
        self._write(status)
        child = self._start(status, exit_codes)
        stop_by = None
        superseded = False
        while child.poll() is None:
            for received in signals.wait(LOOK_SECONDS if stop_by is None else 0.2):
                name = signal.Signals(received).name
                status.asked = status.asked or name
                _signal_all(_descendants(), received)
                ending = name == "SIGINT" or (
                    name == "SIGTERM" and self.cluster == "local"
                )  # on SLURM the end is SLURM's
                if stop_by is None and ending:
                    stop_by = time.time() + self.grace_seconds
            superseded = superseded or self._newest_token() not in ("", status.token)
            if superseded or (stop_by and time.time() > stop_by):
                _kill_all()
        # Known from here on: SLURM may kill us while we wait for the rest.
        status.step = newest_step(self.log)
        status.exit_code, status.kind = self._verdict(child.returncode, exit_codes, status, previous, superseded)
        self._write(status)
        if status.asked:  # the shell is gone, a rank may still be saving
            _end_descendants((stop_by or time.time() + KILLED_WITHIN_SECONDS) - time.time())
        else:
            _signal_all(_descendants(), signal.SIGTERM)
            _end_descendants(EXIT_GRACE_SECONDS)
        status.step = newest_step(self.log)
        code, kind = self._verdict(child.returncode, exit_codes, status, previous, superseded)
        self._end(status, code, kind)
        if self.cluster == "slurm" and code and not superseded:
            if status.asked == "SIGTERM":
                _wait_to_be_killed()
            if kind == "checkpointed":
                requeue(status.job_id)

    def _start(self, status: Status, exit_codes: Path) -> subprocess.Popen:
        environment = {**os.environ, **self.environment}
        environment |= {"ATTEMPT_TOKEN": status.token, "ATTEMPT_TOKEN_FILE": self.token_file}
        if int(os.environ.get("SLURM_JOB_NUM_NODES") or 1) > 1 and self.cluster == "slurm":
            environment["LAUNCH_RANKS"] = str(ranks_path(self.folder, status.restart))
        if self.cluster == "local":
            # submitit hides all GPUs from a job that asked for none, and gives every other one the first ones.
            _set(environment, "CUDA_VISIBLE_DEVICES", self.original_cuda_visible_devices)
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(status.gpus)
        setup = Path(self.folder) / f"bash-{status.restart}"
        quoted = [shlex.quote(text) for text in (os.environ.get("BASH_ENV", ""), str(exit_codes))]
        exits.write_whole(setup, BASH_SETUP.format(previous=quoted[0], exit_codes=quoted[1]))
        expanded = re.sub(r'([$`"\\])', r"\\\1", str(setup))  # bash takes BASH_ENV for the inside of double quotes
        script = f"trap : TERM; export BASH_ENV={shlex.quote(expanded)}; {self.command}"
        return subprocess.Popen(
            ["/bin/sh", "-c", script],
            cwd=self.workdir,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_child_signals,
        )

    def _newest_token(self) -> str:
        """Nothing where the file system does not answer for a moment: no reason to end a training."""
        try:
            return _read(self.token_file)
        except OSError:
            return ""

    def _verdict(
        self, returncode: int, exit_codes: Path, status: Status, previous: dict, superseded: bool
    ) -> tuple[int, str]:
        """Exit code and class of failure of the rule's own command."""
        if returncode == 0:
            return 0, "success"
        if superseded:
            return exits.STALE, "stale"
        failed = [code for code in map(int, _read(exit_codes).split()) if code]
        code = failed[-1] if failed else 128 - returncode if returncode < 0 else returncode
        if status.asked == "SIGUSR2" and code == 128 + signal.SIGUSR2:
            # Ignored at the start, it kills only who handled it and had restored the default while ending: some clusters
            # signal all processes of a job, others only us, so that a trainer can get it a second time while it exits.
            code = exits.CHECKPOINTED
        kind = exits.kind(code)
        if kind == "checkpointed" and not _got_further(status.step, previous.get("step")):
            kind = "no_progress"
        elif self.cluster == "local" and status.asked in ("SIGTERM", "SIGINT"):
            kind = "cancelled"
        elif not failed and _read(exit_codes):
            kind = "outputs"
        return code, kind

    def _end(self, status: Status, exit_code: int, kind: str | None = None) -> None:
        status.state, status.ended, status.exit_code = "ended", time.time(), exit_code
        status.kind = kind or exits.kind(exit_code)
        self._write(status)

    def _write(self, status: Status) -> None:
        exits.write_whole(exits.status_path(self.folder, status.restart), json.dumps(asdict(status), indent=1))


class Signals:
    """SIGTERM, SIGUSR2 and SIGINT as a queue to read, in place of submitit's handlers; a child's end wakes the reader too."""

    HEARD = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # submitit also catches SIGCONT, which says nothing here

    def __init__(self):
        self._read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (*self.HEARD, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.siginterrupt(signal.SIGCHLD, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait(self, seconds: float) -> list[int]:
        """Signals received since the last call, waiting at most `seconds` for one or for the end of a child."""
        if not select.select([self._read], [], [], seconds)[0]:
            return []
        received = os.read(self._read, 4096)
        return [number for number in dict.fromkeys(received) if number in self.HEARD]

    def pause(self, seconds: float) -> None:
        """Sleep; raises GivenUp when asked to stop."""
        if {signal.SIGTERM, signal.SIGINT} & set(self.wait(seconds)):
            raise GivenUp


def new_token(token_file: str, job_id: str, restart: int) -> str:
    """Declare this attempt the newest of its work. Tokens sort by attempt; whoever finds another one there has to end."""
    number = int(_read(token_file).partition("-")[0] or 0) + 1
    token = f"{number:08d}-{job_id}-{restart}"
    exits.write_whole(token_file, token)
    return token


def ranks_path(folder: str, restart: int) -> Path:
    """Where the launcher on the first node says what the other nodes shall run."""
    return Path(folder) / f"ranks-{restart}.json"


def newest_step(log: str | None, tail_bytes: int = 65536) -> int | None:
    """The newest `step N` of a log file, None when it has none."""
    try:
        with open(log or "", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - tail_bytes))
            steps = STEP.findall(file.read())
    except OSError:
        return None
    return int(steps[-1]) if steps else None


def requeue(job_id: str) -> None:
    """Put this job back into the queue and wait for the end that comes with it; returns only where the site forbids it."""
    for delay in (1, 2, 4, 8, 16, 16):
        if subprocess.run(["scontrol", "requeue", job_id], capture_output=True, timeout=60).returncode == 0:
            _wait_to_be_killed()
            return
        time.sleep(delay)  # slurmctld may be restarting


def _got_further(step: int | None, previous: int | None) -> bool:
    return step is None or step > (previous or 0)


def _wait_to_be_killed() -> None:
    end = time.time() + KILLED_WITHIN_SECONDS
    while time.time() < end:
        time.sleep(1)


def _received_gpus() -> list[str]:
    """GPUs of this job on this node, as SLURM tells it."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if os.environ.get(name):
            return [gpu for gpu in os.environ[name].split(",") if gpu != "NoDevFiles"]
    return [str(index) for index in range(int(os.environ.get("SLURM_GPUS_ON_NODE") or 0))]


def _gpu_type() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return names[0].strip() if names else None


def _adopt_orphans() -> None:
    """Processes whose parent dies become our children (PR_SET_CHILD_SUBREAPER), so none of the job's escapes our signals."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _child_signals() -> None:
    # An ignored signal stays ignored over exec: whoever does not know SIGUSR2 must not die of it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _descendants() -> list[psutil.Process]:
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def _signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _kill_all() -> None:
    for _ in range(20):  # what forks while we kill is found by the next look
        alive = _descendants()
        if not alive:
            return
        _signal_all(alive, signal.SIGKILL)
        time.sleep(0.05)


def _end_descendants(seconds: float) -> None:
    """Wait until nothing of the job runs any more; what is left after `seconds` is killed."""
    end = time.time() + seconds
    while _descendants():
        if time.time() > end:
            return _kill_all()
        time.sleep(0.1)


def _read(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text()
    except FileNotFoundError:
        return ""


def _set(environment: dict[str, str], name: str, value: str | None) -> None:
    environment.pop(name, None)
    if value is not None:
        environment[name] = value
