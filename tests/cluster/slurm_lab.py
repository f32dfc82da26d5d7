"""What the cluster tests share: the cluster's commands, a Snakemake run in the background, and how to compare with sacct."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from snakemake_executor_plugin_submitit import ledger

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SYSTEM_PATH = "/usr/sbin:/sbin"
MEASURED: list[tuple[str, str]] = []  # (test, what it measured), shown when all tests have run


class Lab:
    """The cluster: its folder, its daemons, and the commands that a test needs."""

    def __init__(self, folder: Path, base_port: int):
        self.folder = folder
        self.environment = {**os.environ, "LAB": str(folder), "BASE_PORT": str(base_port)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SYSTEM_PATH}"
        self.environment["SLURM_CONF"] = str(folder / "etc/slurm.conf")
        self.environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'slurm'}"

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def take_nodes(self, nodes: int, seconds: int) -> None:
        """Submit a job of the higher partition on all GPUs of so many nodes, which preempts what runs there."""
        size = [f"-N{nodes}", "--gpus-per-node=4", "--mem=100", "--time=1"]
        self.call("sbatch", "-p", "gpu_high", *size, "-o", "/dev/null", "--wrap", f"sleep {seconds}")

    def sacct(self, job_id: str, fields: str) -> list[list[str]]:
        """Every run of a job, oldest first."""
        text = self.call("sacct", "-X", "-D", "-P", "-n", "-S", "now-1hours", "-j", job_id, "-o", fields)
        return [line.split("|") for line in text.splitlines()]

    def pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def start(self, daemon: str, *arguments: str) -> None:
        self.call(daemon, *arguments)

    def heal(self) -> None:
        """All nodes idle, no job left: what each test starts from."""
        self.call("scancel", f"--user={os.getuid()}", check=False)
        for node in ("artemis-gpu1", "artemis-gpu2"):
            if not _alive(self.pid(f"slurmd-{node}")):
                self.start("slurmd", "-N", node)
            state = self.call("sinfo", "-hN", "-n", node, "-p", "gpu", "-o", "%T")
            if "idle" not in state and "alloc" not in state and "mix" not in state and "comp" not in state:
                self.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_until(
            lambda: self.call("sinfo", "-hN", "-p", "gpu", "-o", "%T").split() == ["idle", "idle"], 60, "idle nodes"
        )


class Driver:
    """One Snakemake run in its own folder, started in the background; `log` is what it printed."""

    def __init__(self, lab: Lab, folder: Path, *arguments: str, resources: tuple[str, ...] = (), **environment: str):
        self.folder, self.lab = folder, lab
        self.started = time.time()
        self.output = folder / f"driver-{time.time_ns()}.log"
        defaults = {"slurm_partition": "gpu", "runtime": "10", "mem_mb": "300"}
        defaults |= dict(resource.split("=", 1) for resource in resources)
        command = [sys.executable, "-m", "snakemake", "--executor", "submitit", "--submitit-cluster", "slurm"]
        command += ["--submitit-poll-seconds", "2", "--jobs", "50", "--latency-wait", "20", "--scheduler", "greedy"]
        command += ["--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime", "--quiet", "host"]
        command += ["--printshellcmds", *arguments]
        command += ["--default-resources", *(f"{key}={value}" for key, value in defaults.items())]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=lab.environment | environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                # Where these tests run in the background of a shell, SIGINT is ignored, and would stay so.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def log(self) -> str:
        return self.output.read_text()

    def wait(self, seconds: float) -> int:
        """Exit code; fails with the log when it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log[-6000:]}") from None

    def succeeds(self, seconds: float) -> None:
        assert self.wait(seconds) == 0, self.log[-6000:]

    def attempts(self, rule: str | None = None) -> list[dict]:
        records = ledger.read_attempts(self.folder / "results/jobs/ledger.jsonl")
        return [record for record in records if rule in (None, record["rule"])]

    def job_id(self, rule: str) -> str | None:
        records = self.attempts(rule)
        return records[-1]["job_id"] if records else None

    def state(self, rule: str) -> str | None:
        """SLURM's state of the newest job of a rule."""
        job_id = self.job_id(rule)
        return job_id and self.lab.call("squeue", "-h", "-j", job_id, "-t", "all", "-o", "%T", check=False)


def recoveries(attempts: list[dict]) -> list[str]:
    """For each attempt that another one followed: how it ended, and the seconds until the next one started."""
    works: dict[str, list[dict]] = {}
    for record in attempts:
        works.setdefault(f"{record['rule']} {record['wildcards']}", []).append(record)
    return [
        f"{before['state']} (exit code {before['exit_code']}), {after['started'] - before['ended']:.0f} s to the next start"
        for records in works.values()
        for before, after in itertools.pairwise(records)
        if before["ended"] and after["started"]
    ]


def wait_until(condition, seconds: float, what: str, pause: float = 0.3):
    end = time.time() + seconds
    while time.time() < end:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError(f"not within {seconds} s: {what}")


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def assert_agrees_with_sacct(driver, cluster):
    """The ledger's attempts and GPU-hours are those of `sacct -D`, to the second."""
    for job_id in {record["job_id"] for record in driver.attempts()}:
        environment = cluster.environment | {"SLURM_TIME_FORMAT": "%s"}
        command = [
            "sacct",
            "-X",
            "-D",
            "-P",
            "-n",
            "-S",
            "now-1hours",
            "-j",
            job_id,
            "-o",
            "Start,End,AllocTRES,NodeList",
        ]
        text = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        accounted = [line.split("|")[:3] for line in text.splitlines() if not line.endswith("None assigned")]
        records = [record for record in driver.attempts() if record["job_id"] == job_id and record["started"]]
        assert [(int(r["started"]), int(r["ended"])) for r in records] == [(int(s), int(e)) for s, e, _ in accounted]
        ours = sum(record["gpus"] * (record["ended"] - record["started"]) for record in records)
        theirs = sum(_gpus(tres) * (int(end) - int(start)) for start, end, tres in accounted)
        assert ours == theirs


def _gpus(tres: str) -> int:
    return next((int(item.split("=")[1]) for item in tres.split(",") if item.startswith("gres/gpu=")), 0)
