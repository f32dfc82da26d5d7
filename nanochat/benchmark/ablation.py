"""What do the model's additions give? Trains d12 from the same start for the same time, without them and with each of them.

plain          no additions
<one>+<other>  those, or one alone
<row>#2        with another seed, so that the spread is seen

Without --case: plain, the additions one by one and all together.

A row is a training of its own on the text of --tokens, through the trainer, on one GPU (or the CPU): a first run of a few steps
says how many steps fit in the time, a second one trains as many with the whole schedule. The held-out text's bits per byte after
it are what counts. Steps are shorter here than a long training's, so that there are enough of them.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import command_settings, config, hardware
from nanochat.data.loader import PretrainLoader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.files import read_json_lines
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.progress import say
from nanochat.train.distributed import World, world
from nanochat.train.trainer import Trainer

SECONDS = 60.0
TRIAL_STEPS, WARM_STEPS = 12, 4
PLAIN, OTHER_SEED = "plain", "#2"
ALL = "+".join(config.ADDITIONS)
CASES = (PLAIN, PLAIN + OTHER_SEED, *config.ADDITIONS, ALL, ALL + OTHER_SEED)
NEVER = 10**9  # steps


@dataclass(frozen=True)
class Setup:
    """What all rows have in common."""

    tokens: str  # folder of the token shards
    tokenizer: str  # and of the tokenizer
    model: config.Model
    sequence_length: int
    device_batch_size: int
    tokens_per_step: int
    validation_tokens: int
    seed: int = 1337
    dtype: str = "auto"
    compile: str = "auto"

    @classmethod
    def of(
        cls, tokens: str, tokenizer: str, settings: command_settings.BenchmarkSettings | None, device: torch.device
    ) -> "Setup":
        """d12 at T = 2,048 with 131,072 tokens a step, or the settings' model with 16 rows a step; on a CPU a tiny one."""
        if settings:
            length = settings.sequence_length
            sizes = (settings.model, length, 8, 16 * length, 64 * length)
            return cls(tokens, tokenizer, *sizes, settings.seed, settings.dtype, settings.compile)
        if device.type == "cuda":
            return cls(tokens, tokenizer, config.Model(depth=12), 2048, 32, 131_072, 2**20)
        return cls(tokens, tokenizer, config.Model(depth=4, head_dim=32, width=128), 256, 8, 2048, 8192)


def measure(setup: Setup, device: torch.device, cases: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The rows of benchmark/ablation.json, one by one.

    cases    the rows; empty: CASES
    seconds  of training steps, in each row
    Raises UserError for an addition that there is none of.
    """
    for case in cases:
        if unknown := set(_additions(case)) - set(config.ADDITIONS):
            known = ", ".join(config.ADDITIONS)
            raise UserError(
                f"benchmark ablation: --case {case}: no addition {min(unknown)}; there are {known}, and plain alone."
            )
    for case in cases or CASES:
        torch.compiler.reset()
        row = _row(setup, case, seconds, device)
        took = f"{row['steps']} steps in {row['seconds']:.1f} s"
        say("benchmark ablation", f"{case}: {row['val_bpb']:.4f} bits per byte after {took}")
        yield row


def _additions(case: str) -> list[str]:
    name = case.removesuffix(OTHER_SEED)
    return [] if name == PLAIN else name.split("+")


def _row(setup: Setup, case: str, seconds: float, device: torch.device) -> dict[str, Any]:
    seed = setup.seed + case.endswith(OTHER_SEED)
    sizes = setup.model.model_copy(update={"additions": _additions(case)}).resolved()
    with world(1 if device.type == "cuda" else 0) as ranks:
        _, lines = _trained(setup, sizes, TRIAL_STEPS, seed, ranks, validate=False)
        step_seconds = statistics.median(line["seconds"] for line in lines[WARM_STEPS:])
        hardware.reset_peak_memory(device)
        steps = max(TRIAL_STEPS, int(seconds / step_seconds))
        trainer, lines = _trained(setup, sizes, steps, seed, ranks, validate=True)
    took = sum(line["seconds"] for line in lines)
    return {
        "case": case,
        "depth": sizes.depth,
        "width": sizes.width,
        "sequence_length": setup.sequence_length,
        "vocab_size": trainer.model.config.vocab_size,
        "tokens_per_step": setup.tokens_per_step,
        "device_batch_size": setup.device_batch_size,
        "compile": trainer.compiled,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": steps,
        "tokens": trainer.history.tokens,
        "seconds": took,
        "tokens_per_second": trainer.history.tokens / took,
        "peak_memory_bytes": trainer.history.peak_memory_bytes,
        "loss_last": lines[-1]["loss"],
        "val_bpb": lines[-1]["val_bpb"],
    }


def _trained(
    setup: Setup, sizes: config.Model, steps: int, seed: int, ranks: World, validate: bool
) -> tuple[Trainer, list[dict[str, Any]]]:
    """A trainer that has done its steps, and its log; validated after the last one."""
    tokenizer, length = Tokenizer.load(setup.tokenizer), setup.sequence_length
    model = GPT(GPTConfig.from_settings(sizes, tokenizer.vocab_size, length))
    model.init_weights(torch.Generator().manual_seed(seed))
    model.to(ranks.device).compute_dtype = hardware.resolve_dtype(setup.dtype, ranks.device)
    train, held_out = (TokenShards.open(setup.tokens, split, verify=False) for split in ("train", "validation"))
    if validate and held_out.total_tokens <= length:
        raise UserError(
            f"{setup.tokens}: {held_out.total_tokens} held-out tokens: not one row of {length}. Hold out more text."
        )
    settings = command_settings.TrainingSettings.for_measuring(
        sizes,
        tokenizer.vocab_size,
        setup.dtype,
        setup.compile,
        seed,
        gpus=1 if ranks.device.type == "cuda" else 0,
        sequence_length=length,
        tokens_per_step=setup.tokens_per_step,
        validate_every_steps=NEVER,
        validation_tokens=setup.validation_tokens,
    )
    with tempfile.TemporaryDirectory(prefix="nanochat-ablation-") as folder:
        trainer = Trainer(
            settings,
            ranks,
            model,
            PretrainLoader(train, setup.tokens_per_step // length, length, seed),
            PretrainLoader(held_out, setup.device_batch_size, length, None) if validate else None,
            tokenizer.token_bytes(),
            steps,
            setup.device_batch_size,
            Path(folder) / "checkpoints",
            Path(folder) / "log.jsonl",
            "ablation",
        )
        trainer.run()
        return trainer, read_json_lines(Path(folder) / "log.jsonl")
