"""Progress of a stage: `base  step 120/800  loss 4.21  12,345 tokens/s  3:10 left`.

On a terminal the line is rewritten in place; elsewhere (the log of a job) it is a plain line every few seconds, which is
what the driver relays.
"""

import sys
import time
from typing import TextIO


class Progress:
    """Says how far a loop is, at most once per `every_seconds` where there is no terminal."""

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str = "step",
        every_seconds: float = 5.0,
        done: int = 0,
        file: TextIO | None = None,
    ):
        self.stage, self.total, self.unit = stage, total, unit
        self.file = file or sys.stderr
        self.live = self.file.isatty()
        self.every_seconds = 0.2 if self.live else every_seconds
        self.first, self.started, self.shown = done, time.monotonic(), -1e9

    def update(self, done: int, **values: float | str) -> None:
        """Show `done` of the total and the values: numbers with four digits, `tokens_per_second` as 12,345 tokens/s,
        strings as they are."""
        now = time.monotonic()
        if now - self.shown < self.every_seconds and done < self.total:
            return
        self.shown = now
        parts = [f"{self.stage}  {self.unit} {done:,}/{self.total:,}"]
        parts += [_shown(name, value) for name, value in values.items()]
        if done > self.first:
            left = (now - self.started) / (done - self.first) * (self.total - done)
            parts.append(f"{clock(left)} left" if done < self.total else f"{clock(now - self.started)} taken")
        line = "  ".join(parts)
        if self.live:
            print(f"\r\x1b[K{line}", end="\n" if done >= self.total else "", file=self.file, flush=True)
        else:
            print(line, file=self.file, flush=True)


def say(stage: str, message: str) -> None:
    """One plain line of progress."""
    print(f"{stage}  {message}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """3:07 or 1:02:03."""
    seconds = round(seconds)
    hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _shown(name: str, value: float | str) -> str:
    if name == "tokens_per_second" and not isinstance(value, str):
        return f"{value:,.0f} tokens/s"
    return f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"
