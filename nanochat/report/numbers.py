"""The numbers of a report: collected once, with unit, device and method, and printed from there.

An entry is {section, row, key, value, unit, device, method}; a value of null has `missing`, the reason why. Whatever
`report.md` prints is one of them, through `show`.
"""

import math
from datetime import UTC, datetime
from typing import Any

Entry = dict[str, Any]

DASH = "–"


class Numbers:
    """Collects the entries, in the order in which they are shown."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(
        self,
        section: str,
        row: str,
        key: str,
        value: Any,
        unit: str = "text",
        *,
        device: str | None = None,
        method: str | None = None,
        missing: str | None = None,
        interval: list[float] | None = None,
    ) -> None:
        """Add one number or text. A value that is None, NaN or infinite is kept as null, with its reason.

        interval  lower and upper end of what the value may be, in its unit
        """
        value = tidy(value)
        if value is None and missing is None:
            missing = "not recorded"
        entry = {"section": section, "row": row, "key": key, "value": value, "unit": unit}
        entry |= {"device": device, "method": method}
        if interval:
            entry["interval"] = tidy(interval)
        self.entries.append(entry if value is not None else entry | {"missing": missing})


def tidy(value: Any) -> Any:
    """Six significant digits are what a measurement is worth; NaN and infinity are no numbers at all."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if value == int(value) and abs(value) < 2**53:
            return int(value)
        # Times in unix seconds keep their seconds.
        return round(value) if abs(value) >= 1e6 else float(f"{value:.6g}")
    if isinstance(value, list | tuple):
        return [tidy(part) for part in value]
    if isinstance(value, dict):
        return {key: tidy(part) for key, part in value.items()}
    return value


def show(entry: Entry | None) -> str:
    """As it stands in the report: `12,345`, `41.2%`, `3 min 07 s`, `1.25 GB`; a dash where there is no value."""
    value = None if entry is None else entry.get("value")
    if value is None:
        return DASH
    unit = entry["unit"]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(show(entry | {"value": part}) for part in value)
    if unit in FORMATS:
        return FORMATS[unit](value)
    return f"{value:,.2f} {unit}"  # any other unit is a currency


def show_with_interval(entry: Entry | None) -> str:
    """`41.2% (38.0 to 44.5%)`; as `show` where there is no interval."""
    shown = show(entry)
    if not entry or entry.get("value") is None or not entry.get("interval"):
        return shown
    low, high = (show(entry | {"value": end}) for end in entry["interval"])
    return f"{shown} ({low.removesuffix('%')} to {high})"


def amount(value: float) -> str:
    """A plain number with about four significant digits and thousands separators."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2e}"
    digits = 3 - math.floor(math.log10(size))
    return f"{value:,.{min(6, digits)}f}"


def duration(seconds: float) -> str:
    """0.4 s, 12.3 s, 4 min 05 s, 2 h 03 min, 3 d 04 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 48 * 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def hours(value: float) -> str:
    """0, 0.0123, 1.234, 1,234.50: a run takes minutes on a laptop and weeks of GPU time on a cluster."""
    return "0" if value == 0 else f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:,.2f}"


def size(count: float) -> str:
    """Bytes, decimal: 999 bytes, 1.25 MB, 80 GB."""
    if abs(count) < 1000:
        return f"{count:.0f} bytes"
    power = 1
    while power < 5 and abs(count) >= 999.5 * 1000**power:
        power += 1
    return f"{count / 1000**power:.3g} {' kMGTP'[power]}B"


def short(count: float) -> str:
    """A large count in words that are read at a glance: 3.28 million."""
    for limit, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if abs(count) >= 0.9995 * limit:  # 999.6 million would be shown as 1e+03 million
            return f"{count / limit:.3g} {word}"
    return f"{count:,.0f}"


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


# A column's title names the unit, so most cells hold the number alone.
FORMATS = {
    "seconds": duration,
    "bytes": size,
    "fraction": lambda value: f"{100 * value:.1f}%",
    "count": lambda value: f"{value:,.0f}",
    "tokens/s": lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
    "bytes/s": lambda value: f"{size(value)}/s",
    "hours": hours,
    "nats/token": lambda value: f"{value:.3f}",
    "bits/byte": lambda value: f"{value:.3f}",
    "bytes/token": lambda value: f"{value:.2f}",
    "milliseconds": lambda value: f"{value:,.2f}",
    "unix seconds": moment,
    "times": lambda value: f"{value:.2f}x",
    "number": amount,
    "short": short,
}
