"""Settings of a run, printed.

`nanochat config` prints the settings in force (the files given, later ones over earlier ones, over the defaults) as a
config.yaml with every key explained; without files, the defaults. `nanochat schema` prints the JSON schema that the
workflow keeps in workflow/schemas/.
"""

import argparse
import json

from nanochat.config import Config
from nanochat.config_files import load_files, render_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", help="config.yaml and what overlays it")


def run(arguments: argparse.Namespace) -> None:
    if arguments.command == "schema":
        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        print(render_yaml(load_files(arguments.files)), end="")
