"""Score a trained stage.

Reads  --config results/config/evaluate.json, --model results/STAGE, --tokenizer results/tokenizer, --corpus results/corpus and
       --tokens results/tokens (their held-out split)
Writes --out results/evaluate/STAGE.json: each task's score beside chance, bits per byte, samples
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanochat import hardware
from nanochat.command_settings import EvaluationSettings
from nanochat.data import heldout
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.evaluate.held_out_tasks import cloze, multiple_choice
from nanochat.evaluate.humaneval import humaneval
from nanochat.evaluate.samples import samples
from nanochat.evaluate.scores import TaskScore
from nanochat.files import read_settings, write_json
from nanochat.infer.capacity import rows_that_fit
from nanochat.infer.engine import Engine
from nanochat.model.files import load_model, read_config
from nanochat.model.gpt import GPT
from nanochat.progress import say
from nanochat.version import commit

# Rows that decode side by side, at most; HumanEval has 164 problems.
ROWS = {"cuda": 192, "cpu": 32}
CACHE_SHARE = 0.5  # of the memory that is free, for the engine


class NoItems(Exception):
    """The text is of a kind that a task cannot be made from, code for example, or another script."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--model", required=True, help="folder of the trained stage")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer stage")
    parser.add_argument("--corpus", required=True, help="folder of the corpus stage")
    parser.add_argument("--tokens", required=True, help="folder of the tokens stage")
    parser.add_argument("--out", required=True, help="file to write")


def run(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    settings = read_settings(arguments.config, EvaluationSettings)
    own = settings.evaluate
    device = hardware.pick_device(min(own.gpus, 1))
    tokenizer = Tokenizer.load(arguments.tokenizer)
    stage = str(read_config(arguments.model).get("stage"))
    dtype = hardware.resolve_dtype(settings.dtype, device)
    model = load_model(arguments.model, device, dtype, tokenizer_sha256=tokenizer.sha256).eval()
    chat = stage != "base"
    engine = make_engine(model, tokenizer, own.humaneval_tokens)
    tasks: dict[str, Callable[[], TaskScore]] = {
        "bits_per_byte": partial(_bits_per_byte, model, tokenizer, arguments.tokens, own.validation_tokens),
        "cloze": lambda: cloze(
            engine, tokenizer, _items(heldout.cloze_items(arguments.corpus, own.items, settings.seed), "cloze")
        ),
        "multiple_choice": lambda: multiple_choice(
            engine,
            tokenizer,
            _items(heldout.multiple_choice_items(arguments.corpus, own.items, settings.seed), "multiple_choice"),
            chat,
        ),
        "humaneval": lambda: humaneval(engine, tokenizer, own.humaneval_problems, own.humaneval_tokens, chat),
    }
    results: dict[str, dict] = {}
    written: list[dict] = []
    for name in own.tasks:
        begun = time.monotonic()
        if name == "samples":
            written = samples(engine, tokenizer, own, chat, settings.seed)
            say(f"evaluate {stage}", f"samples: {len(written)}")
            continue
        try:
            score = tasks[name]()
        except NoItems as error:  # of what the others measured nothing is lost
            say(f"evaluate {stage}", f"{name}: left out: {error}")
            results[name] = {"score": None, "baseline": None, "items": 0, "skipped": str(error)}
            continue
        results[name] = score.as_json(time.monotonic() - begun)
        chance = "" if score.baseline is None else f" (chance {score.baseline:.4g})"
        say(f"evaluate {stage}", f"{name}: {score.score:.4g} {score.unit}{chance}, {score.items:,} items")
    write_json(
        Path(arguments.out),
        {
            "stage": stage,
            "device": hardware.device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "tasks": results,
            "val_bpb": results.get("bits_per_byte", {}).get("score"),
            "samples": written,
            "seconds": time.monotonic() - started,
            "commit": commit(),
            "torch": torch.__version__,
        },
    )


def make_engine(model: GPT, tokenizer: Tokenizer, new_tokens: int) -> Engine:
    """An engine whose rows hold a training row and what is generated behind it, as many as half of the free memory allows."""
    length = min(model.cos.size(0), model.config.sequence_length + new_tokens)
    device = model.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else hardware.host_memory_bytes()
    rows = rows_that_fit(model.config, length, model.compute_dtype.itemsize, int(CACHE_SHARE * free))
    return Engine(model, tokenizer, rows=max(1, min(ROWS[device.type], rows)), length=length)


def _bits_per_byte(model: GPT, tokenizer: Tokenizer, folder: str, most_tokens: int) -> TaskScore:
    shards = TokenShards.open(folder, "validation")
    if shards.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(f"{folder}: encoded with another tokenizer than the given one. Give the results of one run.")
    score, count = bits_per_byte(model, shards, tokenizer.token_bytes(), most_tokens)
    return TaskScore(
        score=score,
        baseline=None,
        items=count,
        unit="bits/byte",
        description="Loss on held-out text per byte of UTF-8; lower is better, there is no chance level.",
        facts={},
    )


def _items(items: list, task: str) -> list:
    if not items:
        raise NoItems(
            f"the held-out text gives no item of {task}: it is made of sentences in Latin letters, of several documents"
        )
    return items
