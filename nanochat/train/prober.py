"""Starts probes: one process each, ended at a deadline, or when it holds more host memory than there is."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nanochat import command_settings, hardware
from nanochat.errors import UserError
from nanochat.files import write_json
from nanochat.train.measured import OUT_OF_MEMORY

EXIT_OUT_OF_MEMORY = 86
# Why a probe did not run, beside OUT_OF_MEMORY, which is of the size itself: these may be of this job and its host.
OUT_OF_HOST_MEMORY, TOO_SLOW = "more host memory than the job has", "ended after"
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}  # a probe is alone
LOOK_SECONDS = 0.02


class DidNotRun(Exception):
    """This many rows do not fit here; says why."""


class Prober:
    """A function from rows to what `nanochat.train.probe` measured of them.

    with Prober(settings, timeout_seconds) as probe: probe(32)

    ahead  start the next process while one measures: it imports what it needs and waits, which takes seconds off each probe.
           Not on a CPU, where it would disturb what is measured
    """

    def __init__(
        self,
        settings: command_settings.PlanSettings,
        timeout_seconds: float,
        device: str | None = None,
        host_bytes: int | None = None,
        ahead: bool | None = None,
    ):
        """
        device      uuid of the GPU to use; None: the first one
        host_bytes  memory of the host that a probe may hold; None: what is available
        """
        self.settings, self.timeout_seconds = settings, timeout_seconds
        self.host_bytes = hardware.host_memory_bytes() if host_bytes is None else host_bytes
        self.environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        self.environment |= {"CUDA_VISIBLE_DEVICES": device} if device else {}
        self.ahead = bool(settings.gpus) if ahead is None else ahead
        self._waiting: _Process | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Prober":
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-probe-"))
        self._path = Path(folder) / "settings.json"
        write_json(self._path, self.settings.model_dump(mode="json"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting is not None:
            self._waiting.end()
        self._open.close()

    def __call__(self, rows: int, seconds: float = 0.0) -> dict[str, Any]:
        """Try it; `seconds` is how long to measure at least. Raises DidNotRun, and UserError when it fails otherwise."""
        process = self._waiting or _Process(self._path, self.environment)
        self._waiting = _Process(self._path, self.environment) if self.ahead else None
        try:
            process.begin({"rows": rows, "seconds": seconds, "host_bytes": self.host_bytes})
            code = self._wait(process)
            if code == EXIT_OUT_OF_MEMORY:
                raise DidNotRun(OUT_OF_MEMORY if self.settings.gpus else OUT_OF_HOST_MEMORY)
            if code in KILLED or (code == -signal.SIGABRT and "bad_alloc" in process.errors()):
                raise DidNotRun(OUT_OF_HOST_MEMORY)
            if code:
                last = (process.errors().strip().splitlines() or ["no message"])[-1]
                raise UserError(f"the probe of {rows} rows failed with exit code {code}: {last}")
            return process.result()
        finally:
            process.end()

    def _wait(self, process: "_Process") -> int:
        until = time.monotonic() + self.timeout_seconds
        while (code := process.poll()) is None:
            if time.monotonic() > until:
                raise DidNotRun(f"{TOO_SLOW} {self.timeout_seconds:.0f} s")
            if process.resident_bytes() > self.host_bytes:
                raise DidNotRun(OUT_OF_HOST_MEMORY)
            time.sleep(LOOK_SECONDS)
        return code


class _Process:
    """A probe's process, with the compiler's workers that it may start."""

    def __init__(self, settings: Path, environment: dict[str, str]):
        place = tempfile.mkdtemp(dir=settings.parent)
        self._output, self._errors = Path(place) / "output", Path(place) / "errors"
        with self._output.open("w") as output, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nanochat.train.probe", str(settings)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def begin(self, task: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has failed already, and its exit code says how
            print(json.dumps(task), file=self._process.stdin, flush=True)

    def poll(self) -> int | None:
        return self._process.poll()

    def errors(self) -> str:
        return self._errors.read_text()

    def result(self) -> dict[str, Any]:
        return json.loads(self._output.read_text().strip().splitlines()[-1])

    def resident_bytes(self) -> int:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        return 0

    def end(self) -> None:
        """Kill what is left of it, its children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
