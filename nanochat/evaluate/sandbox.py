"""Run a program that a model wrote, where it can do little harm; what the kernel does not allow is named in the outcome.

Three processes. We start the *warden*, a bare Python without site-packages in a session and an empty temporary folder of its
own. The warden leaves the network, the host's process table and all writable files but its folder behind (namespaces, where the
kernel allows; else the functions that destroy the most are taken away), forks the *program*, waits until the deadline, and then kills whatever the program left running, detached children included. We kill the
warden's whole group when it does not report in time.

The program has limits on CPU time, memory, file size, open files and processes, no input, and its output goes nowhere. It
passed only when it ran to its very end: the proof is a random word that is written then, so that `sys.exit(0)` or
`os._exit(0)` in the middle do not pass.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.hardware import cpu_count

Status = Literal["passed", "failed", "timed_out", "killed"]
WARDEN = Path(__file__).with_name("warden.py")
GRACE_SECONDS = 2.0  # what the warden may take beyond the program's deadline


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 3.0  # wall clock, and CPU rounded up
    memory_bytes: int = 512 * 2**20  # of address space
    file_bytes: int = 1 * 2**20  # of any file it writes
    processes: int = 0  # that it may start; a superuser is bound by the deadline alone
    open_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Status
    detail: str = ""  # the exception, or the signal
    isolated: tuple[str, ...] = ()  # namespaces it ran in: network, processes, files


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run Python source text to its end or its limits. Raises nothing that the program causes."""
    limits = limits or Limits()
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "word": word, **vars(limits)})
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-", ignore_cleanup_errors=True) as folder:
        warden = subprocess.Popen(
            # No user site, no site-packages, nothing beside the script; the environment is ours, with its PYTHONHASHSEED.
            [sys.executable, "-s", "-S", "-P", str(WARDEN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            answer, _ = warden.communicate(order.encode("utf-8", "surrogatepass"), limits.seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            _kill_group(warden)
    try:
        report = json.loads(answer)
        status, isolated = report["status"], tuple(report["isolated"])
    except (ValueError, KeyError, TypeError):
        return Outcome("timed_out", "the warden itself did not answer")
    passed = report.get("word") == word
    if status == "ended":
        return Outcome("passed" if passed else "failed", report["detail"], isolated)
    return Outcome(status, report["detail"], isolated)


def run_all(programs: list[str], limits: Limits | None = None) -> list[Outcome]:
    """Run them side by side, one for each core."""
    with ThreadPoolExecutor(max(1, cpu_count())) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


def _kill_group(process: subprocess.Popen) -> None:
    """Kill the warden's session and reap it; its group lives on as long as a process of it does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
