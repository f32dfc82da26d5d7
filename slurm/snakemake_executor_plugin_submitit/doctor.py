"""Checks of a cluster before anything is queued on it: `nanochat doctor --profile profiles/artemis`.

`examine` compares requests with what SLURM says of itself. It runs before a run's first submission too; nothing is queued if a
finding is fatal. Only the command line also sends a small job, to see whether a node can write the shared folder.
"""

import argparse
import getpass
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import profiles, resources
from .resources import Request, said, to_change

FATAL, WARNING, OK = "fatal", "warning", "ok"
LEAST_TRAINING_MINUTES = 10  # start-up, compiling and the save before the walltime leave nothing of less
NETWORKLESS = {"tmpfs", "ramfs", "overlay"}


@dataclass(frozen=True)
class Finding:
    level: str
    what: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.change}" if self.change else self.what


@dataclass
class Cluster:
    """What SLURM says of itself; a part that could not be asked is empty."""

    config: dict[str, str]
    partitions: dict[str, dict[str, str]]
    gres: dict[str, str]  # partition -> gres of its nodes, "gpu:a100:4"
    accounts: set[str]
    qos: set[str]
    qos_walltime: dict[str, str]
    largest_node: dict[str, tuple[int, int]] = field(default_factory=dict)  # partition -> most CPUs, most MB of a node

    @classmethod
    def ask(cls) -> "Cluster":
        """Raises ValueError when slurmctld cannot be asked at all."""
        config = {}
        for line in _run("scontrol", "show", "config").splitlines():
            key, found, value = line.partition("=")
            if found:
                config[key.strip()] = value.strip()
        if not config:
            raise ValueError(
                "SLURM does not answer: `scontrol show config` failed. Is this a login node of the cluster?"
            )
        partitions = {}
        # --all: a site may hide partitions from these lists, and sbatch takes them still.
        for line in _run("scontrol", "--all", "show", "partition", "--oneliner").splitlines():
            fields = dict(item.split("=", 1) for item in line.split() if "=" in item)
            partitions[fields.get("PartitionName", "")] = fields
        gres: dict[str, str] = {}
        largest: dict[str, tuple[int, int]] = {}
        for line in _run("sinfo", "--all", "--noheader", "--exact", "-o", "%R|%G|%c|%m").splitlines():
            name, value, cpus, memory = line.split("|")
            gres[name] = ",".join(filter(None, [gres.get(name), value]))
            if cpus.isdigit() and memory.isdigit():
                most = largest.get(name, (0, 0))
                largest[name] = max(most[0], int(cpus)), max(most[1], int(memory))
        associations = _run("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos")
        rows = [line.split("|") for line in associations.splitlines() if "|" in line]
        walltimes = [
            line.split("|") for line in _run("sacctmgr", "-nP", "show", "qos", "format=name,maxwall").splitlines()
        ]
        return cls(
            config,
            partitions,
            gres,
            {row[0] for row in rows if row[0]},
            {qos for row in rows for qos in row[1].split(",") if qos},
            {row[0]: row[1] for row in walltimes if len(row) > 1 and row[1]},
            largest,
        )

    @property
    def default_partition(self) -> str | None:
        return next((name for name, fields in self.partitions.items() if fields.get("Default") == "YES"), None)


def examine(cluster: Cluster, requests: dict[str, Request], folder: Path | None = None) -> list[Finding]:
    """Findings about these requests (by rule), each named once, fatal ones first."""
    findings: list[Finding] = []
    for rule, request in requests.items():
        findings += _request(cluster, rule, request)
        if resources.trains(rule) and (request.runtime_minutes or LEAST_TRAINING_MINUTES) < LEAST_TRAINING_MINUTES:
            what = f"rule {rule}: runtime = {request.runtime_minutes} min leaves no time to train"
            findings.append(Finding(WARNING, what, 'it counts minutes; "8h" is eight hours'))
    if any(request.gpus for request in requests.values()) and "gres/gpu" not in cluster.config.get(
        "AccountingStorageTRES", ""
    ):
        findings.append(
            Finding(
                WARNING,
                "the cluster does not account for GPUs (AccountingStorageTRES lacks gres/gpu)",
                "GPU-hours come from this run's own ledger; `sacct` cannot confirm them",
            )
        )
    findings += _preemption(cluster, requests)
    if not cluster.config.get("AccountingStorageType", "").startswith("accounting_storage/slurmdbd"):
        findings.append(Finding(WARNING, "there is no slurmdbd", "states come from squeue and the jobs' own files"))
    if folder:
        findings += _folder(folder)
    order = {FATAL: 0, WARNING: 1, OK: 2}
    return sorted(dict.fromkeys(findings), key=lambda finding: order[finding.level])


def _request(cluster: Cluster, rule: str, request: Request) -> list[Finding]:
    """Of several partitions ("gpu,long") SLURM takes the one where the job starts first, and passes over those that cannot run it."""
    names = _partitions(cluster, request)
    if not names:
        return [Finding(FATAL, f"rule {rule}: no slurm_partition", f"there is no default one; take {_names(cluster)}")]
    unknown = [name for name in names if name not in cluster.partitions]
    if unknown:  # sbatch refuses the whole list
        which = f" as {', '.join(map(repr, unknown))}" if len(names) > 1 else ""
        partition, key = _or_environment(request.partition, "slurm_partition", "SBATCH_PARTITION")
        what = f"rule {rule}: {key} = {partition}: no such partition{which}"
        return [Finding(FATAL, what, f"there are {_names(cluster)}")]
    found = {name: _on_partition(cluster, rule, request, name) for name in names}
    fits = [name for name in names if all(finding.level != FATAL for finding in found[name])]
    if fits and cluster.config.get("EnforcePartLimits", "NO") != "ALL":
        only = f"else it runs on {', '.join(fits)} only"
        for name in set(names) - set(fits):
            found[name] = [
                replace(finding, level=WARNING, change=f"{finding.change}, {only}")
                if finding.level == FATAL
                else finding
                for finding in found[name]
            ]
    return [finding for name in names for finding in found[name]]


def _partitions(cluster: Cluster, request: Request) -> list[str]:
    """Where the job may run: what it asks for, else what sbatch's variable says, else the cluster's default."""
    asked = _or_environment(request.partition, "", "SBATCH_PARTITION")[0] or cluster.default_partition
    return asked.split(",") if asked else []


def _on_partition(cluster: Cluster, rule: str, request: Request, name: str) -> list[Finding]:
    partition = cluster.partitions[name]
    found = []
    if partition.get("State") != "UP":
        found.append(Finding(FATAL, f"partition {name} is {partition.get('State')}", f"there are {_names(cluster)}"))
    limit = minutes(partition.get("MaxTime"))
    if request.runtime_minutes and limit and request.runtime_minutes > limit:
        found.append(
            Finding(
                FATAL,
                f"rule {rule}: runtime = {request.runtime_minutes} min is over the {limit} min of partition {name}",
                f"set runtime to {limit}; a training goes on after each walltime",
            )
        )
    if request.runtime_minutes is None and not minutes(partition.get("DefaultTime")):
        most = f"its longest, {limit} min" if limit else "no limit at all"  # as slurm.conf has it for DefaultTime
        change = f"partition {name} has no default, so the job gets {most}; set runtime, shorter jobs start sooner"
        found.append(Finding(WARNING, f"rule {rule}: no runtime", change))
    nodes = partition.get("MaxNodes", "")
    if nodes.isdigit() and request.nodes > int(nodes):
        found.append(
            Finding(FATAL, f"rule {rule}: {said(rule, 'nodes', request.nodes)}", f"partition {name} allows {nodes}")
        )
    cpus, memory = cluster.largest_node.get(name, (None, None))
    if cpus and partition.get("MaxCPUsPerNode", "").isdigit():
        cpus = min(cpus, int(partition["MaxCPUsPerNode"]))
    if cpus and request.cpus > cpus:
        what = f"rule {rule}: threads = {request.cpus}: partition {name} has {cpus} CPUs a node"
        found.append(Finding(FATAL, what, f"set-threads: {rule}={cpus} or fewer"))
    if memory and request.memory_mb and request.memory_mb > memory:
        what = f"rule {rule}: mem_mb = {request.memory_mb}: partition {name} has {memory} MB a node"
        found.append(Finding(FATAL, what, f"set mem_mb to {memory} or less"))
    found += _gpus(cluster, rule, request, name)
    found += _account(cluster, rule, request, partition, name)
    return found


def _gpus(cluster: Cluster, rule: str, request: Request, name: str) -> list[Finding]:
    offered = cluster.gres.get(name, "")
    counts = [int(match) for match in re.findall(r"gpu(?::[\w.-]+)?:(\d+)", offered)]
    models = set(re.findall(r"gpu:([\w.-]+):\d+", offered))  # "gpu:4" names none
    asked = f"rule {rule}: {said(rule, 'gpu', request.gpus)}"
    found = []
    if request.gpus and not counts:
        found.append(Finding(FATAL, f"{asked}: partition {name} has no GPUs", "use another one"))
    elif request.gpus_per_node > (most := max(counts, default=0)):
        change = f"set {to_change(rule, 'gpu')} = {most} or fewer"
        if resources.spreads(rule):
            nodes = next(n for n in range(-(-request.gpus // most), request.gpus + 1) if request.gpus % n == 0)
            change += f", or {to_change(rule, 'nodes')} = {nodes}"
        found.append(Finding(FATAL, f"{asked} on {request.nodes} node(s): partition {name} has {most} a node", change))
    if request.gpu_model and models and request.gpu_model not in models:
        have = ", ".join(sorted(models))
        found.append(
            Finding(FATAL, f"rule {rule}: gpu_model = {request.gpu_model}: partition {name} has {have}", f"use {have}")
        )
    if not request.gpus and counts and not any(not cluster.gres.get(other, "").count("gpu") for other in cluster.gres):
        return found  # there is no partition without GPUs to send it to
    if not request.gpus and counts:
        found.append(Finding(WARNING, f"rule {rule} needs no GPU but runs on partition {name}", "use a CPU partition"))
    return found


def _account(cluster: Cluster, rule: str, request: Request, partition: dict, name: str) -> list[Finding]:
    found = []
    enforced = "associations" in cluster.config.get("AccountingStorageEnforce", "")
    account, account_key = _or_environment(request.account, "slurm_account", "SBATCH_ACCOUNT")
    qos, qos_key = _or_environment(request.qos, "qos", "SBATCH_QOS")
    same = (account or "").lower()  # as SLURM compares them
    if account and cluster.accounts and same not in {name.lower() for name in cluster.accounts}:
        yours = ", ".join(sorted(cluster.accounts))
        level = FATAL if enforced else WARNING
        found.append(Finding(level, f"rule {rule}: {account_key} = {account} is not yours", f"yours: {yours}"))
    allowed = partition.get("AllowAccounts", "ALL")
    if account and allowed != "ALL" and same not in allowed.lower().split(","):
        found.append(Finding(FATAL, f"rule {rule}: partition {name} does not take {account}", f"it takes {allowed}"))
    if qos and cluster.qos and qos not in cluster.qos:
        yours = ", ".join(sorted(cluster.qos))
        found.append(Finding(FATAL, f"rule {rule}: {qos_key} = {qos} is not yours", f"yours: {yours}"))
    limit = minutes(cluster.qos_walltime.get(qos or ""))
    if limit and request.runtime_minutes and request.runtime_minutes > limit:
        what = f"rule {rule}: runtime = {request.runtime_minutes} min"
        found.append(Finding(FATAL, what, f"qos {qos} allows {limit} min"))
    return found


def _or_environment(asked: str | None, key: str, variable: str) -> tuple[str | None, str]:
    """What sbatch will take, and where that stands: its own variable where the profile says nothing."""
    return (asked, key) if asked else (os.environ.get(variable) or None, variable)


def _preemption(cluster: Cluster, requests: dict[str, Request]) -> list[Finding]:
    found = []
    names = [name for request in requests.values() for name in _partitions(cluster, request)]
    for name in dict.fromkeys(names):
        mode = cluster.partitions.get(name, {}).get("PreemptMode", "OFF")
        if "CANCEL" in mode:
            found.append(
                Finding(
                    WARNING,
                    f"partition {name}: PreemptMode={mode}",
                    "preempted jobs are submitted anew, after 5 minutes",
                )
            )
        elif "SUSPEND" in mode or "GANG" in mode:
            found.append(
                Finding(WARNING, f"partition {name}: PreemptMode={mode}", "preempted jobs stand still, without loss")
            )
    if cluster.config.get("JobRequeue") == "0":
        found.append(Finding(OK, "JobRequeue=0", "the plugin asks for --requeue itself"))
    return found


def _folder(folder: Path) -> list[Finding]:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True)
    kind = done.stdout.strip()
    if kind in NETWORKLESS:
        return [
            Finding(WARNING, f"{folder} is on {kind}", "on more than one host it must be a folder that all nodes share")
        ]
    return []


def probe_folder(folder: Path, request: Request, seconds: int = 20) -> Finding:
    """Whether a node can write `folder`: a job of one CPU that writes a file. Not fatal when none starts within `seconds`."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as shared:
        wanted = Path(shared) / "written-by-a-node"
        options = [
            f"--immediate={seconds}",
            "--ntasks=1",
            "--time=1",
            "--mem=100",
            "--job-name=doctor",
            "--export=PATH",
        ]
        # srun does not read sbatch's variables.
        for flag, asked in (("partition", request.partition), ("account", request.account), ("qos", request.qos)):
            value, _ = _or_environment(asked, flag, f"SBATCH_{flag.upper()}")
            options += [f"--{flag}={value}"] if value else []
        command = ["sh", "-c", 'echo started; touch "$0"', str(wanted)]  # what is said before it starts is srun's own
        started = False
        try:
            done = subprocess.run(["srun", *options, *command], capture_output=True, text=True, timeout=3 * seconds)
            words, started = done.stderr.strip(), "started" in done.stdout
        except subprocess.TimeoutExpired:
            words = "no answer"
        if wanted.exists():
            return Finding(OK, f"{folder} is written by a node and seen here")
        if not started and ("immediate" in words.lower() or "no answer" in words or "busy" in words.lower()):
            return Finding(WARNING, f"{folder}: not checked", f"no node was free within {seconds} s")
        lines = words.splitlines() or ["no message"]
        if not started:
            return Finding(WARNING, f"{folder}: not checked", f"srun was refused: {lines[-1]}")
        reason = next((line for line in lines if not line.startswith("srun:")), lines[-1])
        return Finding(FATAL, f"{folder}: a node could not write it ({reason})", "use a folder that all nodes share")


def minutes(text: str | None) -> int | None:
    """SLURM's "2-00:00:00", "08:00:00", "30:00" -> minutes; None for no limit."""
    if not text or not re.fullmatch(r"(\d+-)?[\d:]+", text):
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minute, second = [*parts, 0, 0][:3]
    else:
        hours, minute, second = ([0, 0, *parts])[-3:] if len(parts) > 1 else (0, parts[0], 0)
    return (int(days or 0) * 24 + hours) * 60 + minute + (1 if second else 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nanochat doctor",
        description="Check partition, account, limits and shared folder before anything is queued.",
    )
    parser.add_argument("--profile", type=Path, required=True, help="Snakemake profile whose resources are checked.")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="Folder that all nodes must share.")
    parser.add_argument(
        "--no-job", action="store_true", help="Do not send the small job that writes the shared folder."
    )
    arguments = parser.parse_args(argv)
    try:
        profile = profiles.load(arguments.profile)
        cluster = Cluster.ask()
    except (ValueError, OSError) as error:
        print(f"nanochat doctor: {error}", file=sys.stderr)
        return 2
    requests = profile.requests
    findings = examine(cluster, requests, arguments.folder)
    findings += [Finding(WARNING, what, hint) for what, hint in profile.without_effect]
    if not arguments.no_job and not any(finding.level == FATAL for finding in findings):
        first = min(requests.values(), key=lambda request: request.gpus)
        findings.append(probe_folder(arguments.folder.absolute(), first))
    for finding in findings:
        print(f"{finding.level:8}{finding}")
    fatal = sum(finding.level == FATAL for finding in findings)
    print(f"{len(requests)} requests checked on {cluster.config.get('ClusterName', 'this cluster')}: {fatal} fatal")
    return 1 if fatal else 0


def _names(cluster: Cluster) -> str:
    return ", ".join(cluster.partitions) or "none"


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
