"""Signals that ask a run to stop: noted at once, obeyed at the next step boundary.

SLURM sends SIGTERM when it preempts a job and submitit sends SIGUSR2 before the walltime ends: both mean save and leave.
SIGINT (Ctrl-C) the same; a second one ends the process at once.
"""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopSignals:
    """with StopSignals() as stop: ... stop.received is the first signal that came, or None."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
