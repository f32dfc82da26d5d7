"""report.json to report.md: nothing is printed that is not an entry there, and nothing is computed here."""

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nanochat.report.numbers import DASH, show, show_with_interval
from nanochat.report.words import TITLES, WORDS


class Report:
    """The content of a report.json, looked up by section, row and key."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.found: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        for entry in content["values"]:
            self.found[entry["section"]][entry["row"]].setdefault(entry["key"], entry)

    def has(self, section: str, row: str | None = None, key: str | None = None) -> bool:
        """Whether there is anything to show."""
        rows = self.found.get(section, {})
        if row is None:
            return bool(rows)
        return bool(rows.get(row)) if key is None else rows.get(row, {}).get(key, {}).get("value") is not None

    def rows(self, section: str) -> list[str]:
        return [row for row in self.found.get(section, {}) if row != "about"]

    def value(self, section: str, row: str, key: str) -> Any:
        return self.found.get(section, {}).get(row, {}).get(key, {}).get("value")

    def show(self, section: str, row: str, key: str) -> str:
        return show(self.found.get(section, {}).get(row, {}).get(key))

    def table(self, section: str, keys: str, head: str | None = None) -> str:
        """A row a row, a column a key. `head`: title of a first column that names the row."""
        columns = [key for key in keys.split() if any(key in self.found[section][row] for row in self.rows(section))]
        lines = [[*([head] if head else []), *(TITLES.get(key, key) for key in columns)]]
        entries = []
        for row in self.rows(section):
            found = [self.found[section][row].get(key) for key in columns]
            entries += zip(columns, found, strict=True)
            shown = [
                WORDS.get(cell, cell) if key == "case" else cell
                for key, cell in zip(columns, map(show_with_interval, found), strict=True)
            ]
            lines.append([*([WORDS.get(row, row)] if head else []), *shown])
        right = [*([False] if head else []), *(self._is_number(section, key) for key in columns)]
        return markdown_table(lines, right) + why_missing(entries)

    def transposed(self, section: str, keys: str, head: str = "") -> str:
        """A row a key, a column a row: for few rows with many keys."""
        rows = self.rows(section)
        lines, entries = [[head, *(WORDS.get(row, row) for row in rows)]], []
        for key in keys.split():
            found = [self.found[section][row].get(key) for row in rows]
            # A text that no row has, such as a remark, needs no line of dashes.
            if any(entry and (entry["value"] is not None or entry["unit"] != "text") for entry in found):
                entries += ((key, entry) for entry in found)
                lines.append([TITLES.get(key, key), *map(show, found)])
        return markdown_table(lines, [False] + [True] * len(rows)) + why_missing(entries)

    def distinct(self, section: str, attribute: str) -> list[str]:
        """The devices or methods of a section, each once."""
        entries = (entry for row in self.found.get(section, {}).values() for entry in row.values())
        return list(dict.fromkeys(entry[attribute] for entry in entries if entry.get(attribute)))

    def _is_number(self, section: str, key: str) -> bool:
        units = {self.found[section][row][key]["unit"] for row in self.rows(section) if key in self.found[section][row]}
        return units != {"text"}


def markdown_table(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Padded, so that it can be read as plain text too; number columns stand at the right."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[index]) for line in cells)) for index in range(len(right))]

    def row(line: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = " | ".join("-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True))
    return "\n".join([row(cells[0]), f"| {rule} |", *map(row, cells[1:])])


def why_missing(entries: Sequence[tuple[str, Mapping[str, Any] | None]]) -> str:
    """A line below a table for the dashes in it."""
    reasons: dict[str, list[str]] = {}
    for key, entry in entries:
        if entry is not None and entry.get("value") is None and entry.get("missing") not in (None, "nothing to say"):
            titles = reasons.setdefault(entry["missing"], [])
            if (title := TITLES.get(key, key)) not in titles:
                titles.append(title)
    if not reasons:
        return ""
    return f"\n\n{DASH} " + "; ".join(f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()) + "."


def block(speaker: str, value: Any) -> str:
    """Text that a model read or wrote, as part of a code block: none of its characters can act as Markdown."""
    lines = []
    for line in str(value if value is not None else DASH).replace("\r", "").strip().split("\n"):
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
        lines += textwrap.wrap(shown, 100, drop_whitespace=False) or [""]
    return "\n".join(f"    {'' if index else speaker:9}{line}" for index, line in enumerate(lines))


def render(content: Mapping[str, Any]) -> str:
    """report.md."""
    environment = Environment(
        loader=PackageLoader("nanochat.report", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["block"] = block
    template = environment.get_template("report.md.jinja")
    report = Report(content)
    text = template.render(report=report, headline=headline_lines(report), missing=content["missing"], words=WORDS)
    lines = [line.rstrip() for line in text.split("\n")]
    # One empty line between blocks, whatever parts of the template were left out.
    kept = [line for index, line in enumerate(lines) if line or (index and lines[index - 1])]
    return "\n".join(kept).strip("\n") + "\n"


def headline_lines(report: Report) -> list[str]:
    """The run in three to eight lines."""

    def run(key: str) -> str:
        return report.show("run", "run", key)

    def has(key: str) -> bool:
        return report.has("run", "run", key)

    last = report.value("run", "run", "last_stage")
    if last is None:
        lines = ["No stage has finished training yet."]
    else:
        size = f"{run('parameters')} parameters" if has("parameters") else "unknown size"
        shape = f" ({run('depth')} layers x {run('width')})" if has("depth") and has("width") else ""
        source = f" ({report.show('corpus', 'about', 'source')})" if report.has("corpus", "about", "source") else ""
        amount = report.show("corpus", "train", "text_bytes")
        kind = "A chat model" if last == "sft" else f"A model (stage {last})"
        on = f"on {amount} of text{source}" if amount != DASH else "on text"
        lines = [f"{kind} of {size}{shape}, trained from scratch {on}."]
        where = run("device")
        if report.value("run", "run", "gpus"):
            where = f"{run('gpus')} x {where}" if "," not in where else f"up to {run('gpus')} GPUs ({where})"
        rate = report.show("training", "base", "tokens_per_second")
        rate = f"; pretraining at {rate} tokens/s" if rate != DASH else ""
        lines.append(f"Training: {run('training_tokens')} tokens in {run('training_seconds')} on {where}{rate}.")
    scores = []
    for task in report.rows("scores"):
        if last and report.has("scores", task, last):
            text = f"{WORDS.get(task, task)} {report.show('scores', task, last)}"
            if report.has("scores", task, "chance"):
                text += f" (chance {report.show('scores', task, 'chance')})"
            scores.append(text)
    if scores:
        lines.append(f"Scores after {last}: {', '.join(scores)}.")
    if has("wall_seconds"):
        failed, interrupted = (
            report.value("run", "run", "attempts_failed"),
            report.value("run", "run", "attempts_interrupted"),
        )
        trouble = f", {run('attempts_failed')} of them failed" if failed else ""
        trouble += (
            f", {run('attempts_cancelled')} cancelled" if report.value("run", "run", "attempts_cancelled") else ""
        )
        trouble += f", {run('attempts_interrupted')} interrupted" if interrupted else ""
        lines.append(
            f"Jobs: {run('jobs')} in {run('attempts')} attempts{trouble}; {run('wall_seconds')} from the first submission "
            f"to the last end, {run('busy_seconds')} of it with a job running."
        )
        # A price of 0 for a CPU-hour is a price, too: say so rather than print a bare 0.
        prices = f"{run('gpu_hour_price')} a GPU-hour, {run('cpu_hour_price')} a CPU-hour without GPU"
        goodput = report.show("goodput", "goodput_training", "share")
        lines.append(
            f"Cost: {run('gpu_hours')} GPU-hours, {run('cpu_hours')} CPU-hours, {run('money')} at {prices}"
            + (f"; goodput of training {goodput}." if goodput != DASH else ".")
        )
    return lines
