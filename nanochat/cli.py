"""`nanochat STAGE ...`: one subcommand a stage, each with explicit input and output paths.

The rules of the workflow call exactly these commands. Bad input ends with one or two lines and exit code 2.
"""

import argparse
import importlib
import os
import sys

from nanochat.errors import UserError

# Name -> module with add_arguments(parser) and run(arguments). Imported only when called: `nanochat report` needs no torch.
COMMANDS = {
    "check": ("nanochat.check", "check settings and corpus, as the workflow does before it queues anything"),
    "config": ("nanochat.settings", "print the settings in force, every key explained"),
    "schema": ("nanochat.settings", "print the JSON schema of the settings"),
    "corpus": ("nanochat.data.corpus", "raw text to shards, with a held-out split"),
    "tokenizer": ("nanochat.data.train_tokenizer", "train the byte-level BPE"),
    "tokens": ("nanochat.data.token_shards", "encode the corpus once"),
    "conversations": ("nanochat.data.conversations", "make and encode the conversations of mid or sft"),
    "batch_size": ("nanochat.train.batch_size", "measure the batch-size plan of a trained stage"),
    "base": ("nanochat.train.stages", "pretraining"),
    "mid": ("nanochat.train.stages", "midtraining: chat format, multiple choice, tool use"),
    "sft": ("nanochat.train.stages", "supervised finetuning"),
    "evaluate": ("nanochat.evaluate.suite", "score a trained stage"),
    "benchmark": ("nanochat.benchmark.command", "before/after measurements on this machine"),
    "report": ("nanochat.report.build", "report.md, report.json and figures of a run"),
    "chat": ("nanochat.infer.chat", "talk to a model in the terminal"),
}

# These belong to the cluster room; the arguments go there as they are.
CLUSTER_COMMANDS = {
    "jobs": (
        "snakemake_executor_plugin_submitit.jobs",
        "every attempt of every job of a run; --follow STAGE shows its log",
    ),
    "doctor": ("snakemake_executor_plugin_submitit.doctor", "check a cluster before anything is queued"),
}


# By default OpenMP's threads spin at a barrier for long: where a core is shared with another job they hold up the very thread
# that they wait for. Measured on 2 cores, tokens/s of the local profile's training, alone / with both cores busy otherwise:
# default 18,500 / 650 to 900, 1000 spins 16,400 / 3,400 to 8,300, 10,000 spins 16,700 alone, no spinning 9,700 to 12,700 alone.
SPINS = "4000"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in CLUSTER_COMMANDS:
        return importlib.import_module(CLUSTER_COMMANDS[argv[0]][0]).main(argv[1:]) or 0
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported, and by the processes of a stage
    name = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="nanochat", description="Train a small ChatGPT, stage by stage.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (module, summary) in (COMMANDS | CLUSTER_COMMANDS).items():
        subparser = subparsers.add_parser(command, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if command == name:
            stage = importlib.import_module(module)
            subparser.description = stage.__doc__
            stage.add_arguments(subparser)
            subparser.set_defaults(run=stage.run)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"nanochat {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of a pipe, `head` for one, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
