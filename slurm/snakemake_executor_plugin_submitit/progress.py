"""Progress of the running jobs, from the newest line of each job's log.

On a terminal: one status line, rewritten in place, out of the way of Snakemake's own messages. Elsewhere: plain lines, when
they changed, at most one per job every few seconds.
"""

import logging
import os
import shutil
import sys
import time

PLAIN_SECONDS = 5.0
TAIL_BYTES = 4096


class Progress:
    """Call `show` often with the jobs that run; it writes when there is something new."""

    def __init__(self, enabled: bool = True, stream=None):
        self.stream = stream or sys.stderr
        self.enabled = enabled
        self.terminal = self.stream.isatty()
        self._shown = ""
        self._last: dict[str, tuple[float, str]] = {}
        self._filter = _ClearBefore(self)

    def install(self, logger: logging.Logger) -> None:
        """Keep the status line away from what `logger` writes."""
        if self.enabled and self.terminal:
            for handler in logger.handlers:
                handler.addFilter(self._filter)

    def show(self, jobs: list[tuple[str, str | None, str | None, float]]) -> None:
        """`jobs`: name, log file or None, what to say while the log says nothing or None, and since when its lines count."""
        if not self.enabled:
            return
        lines = {}
        for name, log, otherwise, since in jobs:
            line = newest_line(log, since) or otherwise
            if line:
                lines[name] = line if line.startswith(name.partition("-")[0]) else f"{name}  {line}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self._rewrite(" | ".join(lines.values())[:width])
        else:
            self._print(lines)

    def clear(self) -> None:
        """Remove the status line."""
        if self._shown:
            self._rewrite("")

    def _rewrite(self, text: str) -> None:
        if text != self._shown:
            self._shown = text
            self._write(f"\r\x1b[K{text}")

    def _print(self, lines: dict[str, str]) -> None:
        now = time.monotonic()
        for name, line in lines.items():
            when, before = self._last.get(name, (float("-inf"), ""))
            if line != before and now - when >= PLAIN_SECONDS:
                self._last[name] = (now, line)
                self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        """A full disk under a redirected output, or a terminal that is gone, ends the progress and not the run."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.enabled, self._shown = False, ""


class _ClearBefore(logging.Filter):
    def __init__(self, progress: Progress):
        super().__init__()
        self.progress = progress

    def filter(self, record: logging.LogRecord) -> bool:
        self.progress.clear()
        return True


def newest_line(path: str | None, since: float = 0.0) -> str | None:
    """The newest complete line of a log file; a line may end in a carriage return. None when there is none, or when the file
    was last written before `since` (unix seconds): that is an earlier attempt's."""
    try:
        with open(path or "", "rb") as file:
            if os.fstat(file.fileno()).st_mtime < since:
                return None
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    except OSError:
        return None
    complete = text[: text.rfind("\n") + 1].split("\n")
    return next((line.rstrip() for line in reversed(complete) if line.strip()), None)
