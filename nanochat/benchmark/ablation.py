"""What do the model's additions give? Trains d12 from the same start for the same time, without them and with each of them.

plain        no additions
<addition>   that one alone; <a>+<b> (given by --case): several
<case>#2     with another seed, so that the spread is seen

Each row is a process' own training on the text of --tokens, through the trainer, on one GPU (or the CPU): a first run of a few
steps says how many steps fit in the time, a second one trains as many with the whole schedule. The held-out text's bits per byte
after it are what counts. Steps are shorter here than a long training's, so that there are enough of them.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
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


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all rows have in common."""

    model: config.Model
    length: int
    rows: int  # of a micro-batch
    tokens_per_step: int
    validation_tokens: int
    seed: int
    dtype: str
    compile: str


def setup_for(settings: command_settings.BenchmarkSettings | None, device: torch.device) -> Setup:
    """d12 at T = 2,048 and 131,072 tokens a step; with settings, or on a CPU, a model of that size or a small one."""
    if settings:
        length = settings.sequence_length
        return Setup(
            settings.model, length, 8, 16 * length, 64 * length, settings.seed, settings.dtype, settings.compile
        )
    if device.type == "cuda":
        return Setup(config.Model(depth=12), 2048, 32, 131_072, 2**20, 1337, "auto", "auto")
    return Setup(config.Model(depth=4, head_dim=32, width=128), 256, 8, 2048, 8192, 1337, "auto", "auto")


def measure(
    setup: Setup, device: torch.device, tokens: str, tokenizer: str, cases: list[str], seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows of benchmark/ablation.json, one by one.

    tokens, tokenizer  folders of those stages
    cases              the rows; empty: plain, plain#2, each addition
    seconds            of training steps, each row
    """
    for case in cases:
        if unknown := set(case.removesuffix(OTHER_SEED).split("+")) - {PLAIN, *config.ADDITIONS}:
            raise UserError(
                f"benchmark ablation: --case {case}: no addition {min(unknown)}; there are {', '.join(config.ADDITIONS)}."
            )
    for case in cases or [PLAIN, PLAIN + OTHER_SEED, *config.ADDITIONS]:
        torch._dynamo.reset()
        row = _row(setup, case, tokens, tokenizer, seconds, device)
        say(
            "benchmark ablation",
            f"{case}: {row['val_bpb']:.4f} bits per byte after {row['steps']} steps, {row['seconds']:.1f} s",
        )
        yield row


def _row(setup: Setup, case: str, tokens: str, tokenizer: str, seconds: float, device: torch.device) -> dict[str, Any]:
    name = case.removesuffix(OTHER_SEED)
    seed = setup.seed + (name != case)
    model = setup.model.model_copy(update={"additions": [] if name == PLAIN else name.split("+")})
    with world(1 if device.type == "cuda" else 0) as ranks:
        trial = _train(setup, model, tokens, tokenizer, TRIAL_STEPS, seed, ranks, validate=False)
        took = sorted(line["seconds"] for line in trial[1][WARM_STEPS:])
        steps = max(TRIAL_STEPS, int(seconds / took[len(took) // 2]))
        trainer, lines = _train(setup, model, tokens, tokenizer, steps, seed, ranks, validate=True)
    return {
        "case": case,
        "depth": trainer.model.config.depth,
        "width": trainer.model.config.width,
        "sequence_length": setup.length,
        "vocab_size": trainer.model.config.vocab_size,
        "tokens_per_step": setup.tokens_per_step,
        "device_batch_size": setup.rows,
        "compile": trainer.compiled,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": steps,
        "tokens": trainer.history.tokens,
        "seconds": sum(line["seconds"] for line in lines),
        "tokens_per_second": trainer.history.tokens / sum(line["seconds"] for line in lines),
        "peak_memory_bytes": trainer.history.peak_memory_bytes,
        "loss_last": lines[-1]["loss"],
        "val_bpb": lines[-1]["val_bpb"],
    }


def _train(
    setup: Setup, sizes: config.Model, tokens: str, tokenizer: str, steps: int, seed: int, ranks: World, validate: bool
):
    encoder = Tokenizer.load(tokenizer)
    model = GPT(GPTConfig.from_settings(sizes, encoder.vocab_size, setup.length))
    model.init_weights(torch.Generator().manual_seed(seed))
    model.to(ranks.device).compute_dtype = hardware.resolve_dtype(setup.dtype, ranks.device)
    train, held_out = (TokenShards.open(tokens, split, verify=False) for split in ("train", "validation"))
    settings = command_settings.TrainingSettings(
        stage="base",
        seed=seed,
        model=sizes,
        vocab_size=encoder.vocab_size,
        dtype=setup.dtype,
        compile=setup.compile,
        on_nonfinite="stop",
        optimizer=config.Optimizer(),
        train=config.Base(
            gpus=1 if ranks.device.type == "cuda" else 0,
            sequence_length=setup.length,
            tokens_per_step=setup.tokens_per_step,
            validate_every_steps=10**9,
            validation_tokens=setup.validation_tokens,
            checkpoint_every_seconds=1e9,
            keep_checkpoints=1,
        ),
    )
    with tempfile.TemporaryDirectory(prefix="nanochat-ablation-") as folder:
        trainer = Trainer(
            settings,
            ranks,
            model,
            PretrainLoader(train, setup.tokens_per_step // setup.length, setup.length, seed),
            PretrainLoader(held_out, setup.rows, setup.length, None) if validate else None,
            encoder.token_bytes(),
            steps,
            setup.rows,
            Path(folder) / "checkpoints",
            Path(folder) / "log.jsonl",
            "ablation",
        )
        trainer.run()
        return trainer, read_json_lines(Path(folder) / "log.jsonl")
