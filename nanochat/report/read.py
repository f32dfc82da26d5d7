"""Reading a run that may be unfinished, damaged or of another version.

Nothing here raises on a run's content: what is missing or cannot be read becomes a note that the report prints.
"""

import json
import math
import struct
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """The files of one run, and what was found wrong with them."""

    results: Path
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def object(self, name: str, otherwise: str | None = None) -> dict[str, Any]:
        """A JSON file that holds an object; {} when it does not. `otherwise`: what its absence means, for the note."""
        path = self.results / name
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            if otherwise:
                self.note(f"`{name}` is not there: {otherwise}.")
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.note(f"`{name}` cannot be read ({one_line(error)}); left out.")
            return {}
        if not isinstance(content, dict):
            self.note(f"`{name}` holds no JSON object; left out.")
            return {}
        return content

    def lines(self, name: str) -> list[dict[str, Any]]:
        """JSON lines. A last line without its end was cut off by a kill and is left out in silence; others are counted."""
        path = self.results / name
        try:
            raw = path.read_bytes().split(b"\n")
        except OSError:
            return []
        found, bad = [], 0
        for line in raw[:-1]:
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            if isinstance(content, dict):
                found.append(content)
            else:
                bad += 1
        if bad:
            self.note(f"`{name}`: {bad:,} unreadable line{'s' * (bad > 1)} left out.")
        return found

    def parameters(self, name: str) -> int | None:
        """Parameters in a safetensors file: its header lists the shapes, so that the weights need not be read."""
        try:
            with open(self.results / name, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(size, 2**26)))
            return sum(math.prod(tensor["shape"]) for key, tensor in header.items() if key != "__metadata__")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None


def number(value: Any) -> float | int | None:
    """The value when it is a finite number, else None."""
    try:
        return (
            value if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value) else None
        )
    except OverflowError:  # a whole number that no float holds
        return None


def whole(value: Any, otherwise: int) -> int:
    """The value as a whole number of 0 or more."""
    value = number(value)
    return otherwise if value is None or value < 0 else int(value)


def unix_seconds(value: Any) -> float | None:
    """A time as unix seconds; an ISO 8601 text, as SLURM prints it, is understood too. 0 and "Unknown" are no times."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    value = number(value)
    return float(value) if value is not None and value > 0 else None


def text(value: Any) -> str | None:
    """The value as text, None when there is nothing to show."""
    if value is None or value == "" or value == [] or value == {}:
        return None
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    return str(value)


def one_line(value: Any) -> str:
    return " ".join(str(value).split())
