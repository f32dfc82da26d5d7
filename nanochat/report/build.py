"""The report of a run.

Reads   the files below --results and nothing else; what is missing or damaged is named in the report, and is no error.
Writes  report.json (every number, with unit, device and method), report.md (made from it), figures/*.png, below --results.

`--headline` writes nothing: it prints the run in a few lines, from the report.json that is there.
"""

import argparse
import time
from pathlib import Path

from nanochat.command_settings import ReportSettings
from nanochat.config import Cost
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, write_json, write_text
from nanochat.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="results/config/report.json: prices; without it, the defaults")
    parser.add_argument("--results", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--headline", action="store_true", help="print the run in a few lines, from its report.json")


def run(arguments: argparse.Namespace) -> None:
    if not arguments.results.is_dir():
        raise UserError(f"--results {arguments.results}: no such folder. It must be the folder of a run.")
    if arguments.headline:
        print(headline(arguments.results))
        return
    cost = read_settings(arguments.config, ReportSettings).cost if arguments.config else Cost()
    build(arguments.results, cost, now=time.time())


def build(results: Path, cost: Cost, now: float) -> None:
    """Write the report of what is there. `now`, unix seconds: until when running jobs are counted."""
    # matplotlib is slow to import, and `--headline` does not need it.
    from nanochat.report.collect import collect
    from nanochat.report.figures import draw_all
    from nanochat.report.read import Run
    from nanochat.report.render import render

    found = collect(Run(results), cost, now)
    draw_all(found, results / "figures")
    content = found.report()
    write_json(results / "report.json", content)
    write_text(results / "report.md", render(content))
    say(
        "report",
        f"{results / 'report.md'}: {len(content['values']):,} numbers, {len(content['missing'])} things missing",
    )


def headline(results: Path) -> str:
    """The run in three to eight lines, from its report.json. Raises UserError when there is none."""
    from nanochat.report.render import Report, headline_lines

    content = read_json(results / "report.json")
    if not isinstance(content, dict) or not isinstance(content.get("values"), list):
        raise UserError(f"{results / 'report.json'}: holds no report. Run the target `report` again.")
    return "\n".join(headline_lines(Report(content)))
