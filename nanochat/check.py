"""Check settings and corpus before anything is queued.

Reads config.yaml and what overlays it, and looks at the text that the corpus settings name. Writes nothing. The workflow
does the same at each start; by hand: `nanochat check config.yaml profiles/local/settings.yaml`.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from nanochat.config import Config
from nanochat.config_files import load_files, name_origin, require_writable
from nanochat.data.preflight import preflight
from nanochat.errors import UserError
from nanochat.train.trackers import require_installed


def check(config: Config, files: Iterable[str | Path]) -> None:
    """Raises UserError when the output folder or the corpus will not do; it names which of `files` set the key."""
    try:
        require_writable(config.results)
        preflight(config)
        require_installed(config.train.trackers)
    except UserError as error:
        raise UserError(name_origin(str(error), files)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", help="config.yaml and what overlays it")


def run(arguments: argparse.Namespace) -> None:
    check(load_files(arguments.files), arguments.files)
    print("settings and corpus: fine")
