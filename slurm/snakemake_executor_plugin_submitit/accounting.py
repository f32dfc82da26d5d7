"""Writes the driver's lines into the ledger, and corrects the times of ends once SLURM's own accounting has them."""

import time
from collections.abc import Callable
from pathlib import Path

from . import ledger
from .status import Observation

CORRECT_SECONDS = 60.0  # between two looks while the run goes on
CLOSE_SECONDS = 10.0  # how long the end of a run waits for the accounting


class Accounting:
    """`ask(job_ids, since)` returns what accounting says of these job ids, one observation per run; None where there is none.

    `warn` gets one line when the ledger cannot be written.
    """

    def __init__(
        self,
        path: Path,
        ask: Callable[[list[str], float], dict[str, list[Observation]]] | None,
        warn: Callable[[str], None],
    ):
        self.path = path
        self.ask = ask
        self.warn = warn
        self._unwritten: list[dict] = []  # lines that a full disk did not take, oldest first
        self._looked = time.monotonic()
        self._unsettled: list[tuple[float, dict]] = []  # (when the job id was first submitted, its record)
        if ask:
            self._take_over()

    def write(self, record: dict) -> None:
        """Append a line. What is not written now is kept: a disk that is full must cost no job that runs."""
        failed_before = bool(self._unwritten)
        self._unwritten.append(dict(record))
        self.write_again()
        if self._unwritten and not failed_before:
            self.warn(f"{self._problem}; the jobs go on, and their lines are written as soon as that works")

    def write_again(self) -> None:
        """Append the lines that are still to be written, in their order: of an attempt the newest wins."""
        try:
            while self._unwritten:
                ledger.append(self.path, self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            self._problem = f"{self.path}: not written: {error.strerror or error}"

    def ended(self, record: dict, first_submitted: float, settled: bool) -> None:
        """Append the final line of an attempt. `settled`: its times are the accounting's own already."""
        self.write(record)
        if self.ask and not settled:
            self._unsettled.append((first_submitted, dict(record)))

    def correct(self, at_once: bool = False) -> None:
        """Append a corrected line for each attempt that accounting has settled by now."""
        if not self._unsettled or not (at_once or time.monotonic() - self._looked > CORRECT_SECONDS):
            return
        self._looked = time.monotonic()
        runs = self.ask(sorted({record["job_id"] for _, record in self._unsettled}), min(t for t, _ in self._unsettled))
        left = []
        for first_submitted, record in self._unsettled:
            past = runs.get(record["job_id"], [])
            run = past[record["restart"]] if record["restart"] < len(past) else None
            if run is None or not run.settled:
                left.append((first_submitted, record))
                continue
            better = {"started": run.started, "ended": run.ended, "eligible": run.eligible}
            better |= {"node_names": run.nodes or record["node_names"], "gpu_type": record["gpu_type"] or run.gpu_type}
            if any(record[key] != value for key, value in better.items()):
                self.write({**record, **better})
        self._unsettled = left

    def close(self) -> None:
        """Give the accounting a moment to say when the last jobs ended; the next run asks for what is still missing."""
        self.write_again()
        if self._unwritten:
            self.warn(f"{self._problem}. {len(self._unwritten)} lines are lost: jobs may run that it does not name")
        end = time.monotonic() + CLOSE_SECONDS
        self.correct(at_once=True)
        while self._unsettled and time.monotonic() < end:
            time.sleep(1)
            self.correct(at_once=True)

    def _take_over(self) -> None:
        """Attempts whose times an earlier run could not settle: SLURM's own are whole seconds."""
        records = [record for record in ledger.read_attempts(self.path) if record["cluster"] == "slurm"]
        first = {}
        for record in records:
            first[record["job_id"]] = min(record["submitted"], first.get(record["job_id"], float("inf")))
        recent = time.time() - 30 * 86400
        for record in records:
            if not ledger.is_open(record) and (record["ended"] or 0) % 1 and record["ended"] > recent:
                self._unsettled.append((first[record["job_id"]], record))
