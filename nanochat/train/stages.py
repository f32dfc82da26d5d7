"""Train a stage: base on the corpus, mid and sft on conversations, from the model of the stage before.

Reads  --config         results/config/<stage>.json
       --plan           results/batch_size/<stage>.json
       --tokenizer      results/tokenizer
       --tokens         results/tokens (base)
       --model          results/base or results/mid (mid, sft)
       --conversations  results/conversations/<stage> (mid, sft)
Writes --out            model.safetensors, config.json, metrics.json, log.jsonl (a line a step; the last line of a step counts)
       --checkpoints    step-*/ while training; a run that is started again goes on from the newest valid one

Exit codes: 0 done (at once when the outputs are already complete), 2 bad input, 85 stopped by a signal after saving a
checkpoint, 86 out of GPU memory, 87 loss or gradient not finite, 88 a newer attempt of this job is running.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import command_settings, config, hardware, version
from nanochat.data.conversation_files import Conversations
from nanochat.data.loader import ChatLoader, PretrainLoader, StepLoader
from nanochat.data.token_shards import TokenShards
from nanochat.data.tokenizer import Tokenizer
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, sha256, write_json
from nanochat.model.files import load_model, read_config, save_model
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.progress import say
from nanochat.train import checkpoint, plan
from nanochat.train.batch_size import measure_again
from nanochat.train.distributed import World, world
from nanochat.train.trackers import require_installed
from nanochat.train.trainer import NonFinite, Trainer

EXIT_FAILED, EXIT_USER_ERROR = 1, 2
EXIT_STOPPED, EXIT_OUT_OF_MEMORY, EXIT_NONFINITE, EXIT_SUPERSEDED = 85, 86, 87, 88
PEERS_SECONDS = 2.0
FEW_STEPS = 10  # so few are hardly a training: the learning rate barely comes down


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stage = parser.prog.split()[-1]
    parser.set_defaults(stage=stage)
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--plan", required=True, help="batch-size plan (JSON)")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer stage")
    if stage == "base":
        parser.add_argument("--tokens", required=True, help="folder of the tokens stage")
    else:
        parser.add_argument("--model", required=True, help="folder of the stage whose model is trained on")
        parser.add_argument("--conversations", required=True, help="folder of this stage's conversations")
    parser.add_argument("--checkpoints", required=True, help="folder of the checkpoints")
    parser.add_argument("--out", required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments.config, command_settings.TrainingSettings)
    if settings.stage != arguments.stage:
        raise UserError(
            f"{arguments.config}: stage = {settings.stage!r}: these are not the settings of {arguments.stage}."
        )
    # Without a given seed anywhere else, nothing may depend on what ran before in this process.
    torch.manual_seed(settings.seed)
    with world(settings.train.gpus) as ranks:
        try:
            return _run(settings, arguments, ranks)
        except NonFinite as error:
            say(settings.stage, str(error))
            return EXIT_NONFINITE
        except checkpoint.AttemptSuperseded as error:
            say(settings.stage, f"{error}: ending without writing anything more")
            return _leave(EXIT_SUPERSEDED, ranks)
        except Exception as error:
            if hardware.is_out_of_gpu_memory(error):
                say(settings.stage, f"out of GPU memory: {str(error).splitlines()[0]}")
                return _leave(EXIT_OUT_OF_MEMORY, ranks)
            if ranks.size == 1:
                raise
            # What is wrong on one rank alone must end it now: the others wait for it in a collective.
            if isinstance(error, UserError):
                say(settings.stage, str(error))
                return _leave(EXIT_USER_ERROR, ranks)
            traceback.print_exc()
            # Most often a peer is gone: the launcher shall see first what that one ended with.
            time.sleep(PEERS_SECONDS)
            return _leave(EXIT_FAILED, ranks)


@dataclass
class Inputs:
    """What a stage trains on. `checksums` of all that the result depends on besides the settings."""

    loader: StepLoader
    validation_loader: StepLoader | None
    checksums: dict[str, Any]
    padding_fraction: float


def _run(settings: command_settings.TrainingSettings, arguments: argparse.Namespace, ranks: World) -> int:
    stage, train, out = settings.stage, settings.train, Path(arguments.out)
    tell = (lambda message: say(stage, message)) if ranks.leads else (lambda message: None)
    require_installed(settings.trackers)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    batches = plan.plan_in_force(
        arguments.plan,
        out,
        train.tokens_per_step,
        train.sequence_length,
        ranks,
        measure=lambda smaller: measure_again(smaller, ranks.device.index),
    )
    rows = plan.rows_per_step(train.tokens_per_step, train.sequence_length, ranks.size, f"train.{stage}")
    plan.accumulation(rows, ranks.size, batches["device_batch_size"], arguments.plan)
    inputs = _inputs(settings, arguments, tokenizer, rows, verify=ranks.leads)
    fingerprint = _fingerprint(settings, inputs.checksums)
    if ranks.share(ranks.leads and is_complete(out, fingerprint)):
        tell(f"{out} is complete already")
        if ranks.leads:  # of an attempt that was killed before it had removed them
            shutil.rmtree(arguments.checkpoints, ignore_errors=True)
        return 0
    model = _model(settings, arguments, tokenizer, ranks)
    steps = _steps(settings, model, inputs.loader)
    tell(
        f"{model.config.depth} layers x {model.config.width}, {model.matmul_parameters():,} parameters in matrix products, "
        f"{steps:,} steps of {train.tokens_per_step:,} tokens, {batches['device_batch_size']} rows a micro-batch, "
        f"{str(model.compute_dtype).removeprefix('torch.')} on {ranks.size} x {hardware.device_name(ranks.device)}"
    )
    epoch = inputs.loader.rows_per_epoch * train.sequence_length
    for remark in _remarks(settings, steps, epoch, inputs.loader.truncated):
        tell(remark)
    trainer = Trainer(
        settings,
        ranks,
        model,
        inputs.loader,
        inputs.validation_loader,
        tokenizer.token_bytes(),
        steps,
        batches["device_batch_size"],
        arguments.checkpoints,
        out / "log.jsonl",
        fingerprint,
        tell,
        plan=batches,
    )
    if not trainer.run():
        return EXIT_STOPPED
    if ranks.leads:
        checkpoint.require_newest_attempt()
        extra = {"tokenizer_sha256": tokenizer.sha256, "stage": stage, "step": steps}
        save_model(out, model, extra)
        # metrics.json comes last: it is what says that the stage is complete.
        metrics = _metrics(settings, trainer, ranks, inputs.padding_fraction)
        write_json(out / "metrics.json", metrics | {"plan": plan.summary(batches)})
        # Whoever forces the stage to run again wants it trained again, not taken from its last checkpoint.
        shutil.rmtree(arguments.checkpoints, ignore_errors=True)
    return 0


def is_complete(out: str | Path, fingerprint: str) -> bool:
    """Whether these outputs are whole and of these settings and inputs: then a stage must not touch them."""
    out = Path(out)
    try:
        if read_json(out / "metrics.json").get("fingerprint") != fingerprint:
            return False
        return sha256(out / "model.safetensors") == read_config(out)["weights_sha256"]
    except (UserError, OSError, KeyError, AttributeError):
        return False


def _inputs(
    settings: command_settings.TrainingSettings,
    arguments: argparse.Namespace,
    tokenizer: Tokenizer,
    rows: int,
    verify: bool,
) -> Inputs:
    """verify  the checksums of the tokens, which are read whole for that: by one rank for all"""
    train = settings.train
    if settings.stage == "base":
        shards = TokenShards.open(arguments.tokens, "train", verify)
        held_out = TokenShards.open(arguments.tokens, "validation", verify)
        _require_tokenizer(shards.tokenizer_sha256, tokenizer, arguments.tokens, arguments.tokenizer)
        loader = PretrainLoader(shards, rows, train.sequence_length, settings.seed)
        measured = max(1, train.validation_tokens // train.sequence_length)
        enough = held_out.total_tokens > train.sequence_length
        return Inputs(
            loader,
            PretrainLoader(held_out, rows, train.sequence_length, None, measured) if enough else None,
            {"tokens": [shard.sha256 for shard in shards.shards], "tokenizer": tokenizer.sha256},
            0.0,
        )
    folder = arguments.conversations
    metrics = read_json(Path(folder) / "metrics.json")
    loss_on_answers = settings.stage == "sft"
    chat = ChatLoader(folder, rows, train.sequence_length, settings.seed, loss_on_answers)
    _require_tokenizer(chat.conversations.tokenizer_sha256, tokenizer, folder, arguments.tokenizer)
    validation = None
    if len(Conversations.open(folder, "validation")):
        validation = ChatLoader(folder, rows, train.sequence_length, None, loss_on_answers, "validation")
    files = metrics["splits"]["train"]["files"]
    return Inputs(
        chat,
        validation,
        {
            "conversations": {name: line["sha256"] for name, line in files.items()},
            "tokenizer": tokenizer.sha256,
            "model": read_config(arguments.model).get("weights_sha256"),
        },
        chat.padding_fraction,
    )


def _require_tokenizer(digest: str, tokenizer: Tokenizer, folder: str, tokenizer_folder: str) -> None:
    if digest != tokenizer.sha256:
        raise UserError(
            f"{folder}/metrics.json: tokenizer_sha256 = {digest[:12]}: encoded with another tokenizer than {tokenizer_folder} "
            f"({tokenizer.sha256[:12]}). It belongs to another run: run its target again."
        )


def _model(
    settings: command_settings.TrainingSettings, arguments: argparse.Namespace, tokenizer: Tokenizer, ranks: World
) -> GPT:
    """Fresh weights for base; those of the stage before for mid and sft."""
    length = settings.train.sequence_length
    sizes = GPTConfig.from_settings(settings.model, tokenizer.vocab_size, length)
    if settings.stage == "base":
        model = GPT(sizes)
        model.init_weights(torch.Generator().manual_seed(settings.seed))
        model.to(ranks.device)
    else:
        model = load_model(
            arguments.model, ranks.device, tokenizer_sha256=tokenizer.sha256, sequence_length=length
        ).float()
        if model.config != sizes:
            raise UserError(
                f"{arguments.model}: holds {model.config.depth} layers x {model.config.width}, the settings ask for "
                f"{sizes.depth} x {sizes.width} (or differ elsewhere in `model`). Run the stage before again."
            )
    model.compute_dtype = hardware.resolve_dtype(settings.dtype, ranks.device)
    return model


def _steps(settings: command_settings.TrainingSettings, model: GPT, loader: StepLoader) -> int:
    """Base: tokens_per_parameter x parameters (those of matrix products), or `steps`. Chat: epochs over the rows."""
    train = settings.train
    if isinstance(train, config.Base):
        horizon = train.tokens_per_parameter * model.matmul_parameters() / train.tokens_per_step
        return train.steps or max(1, math.ceil(horizon))
    return max(1, math.ceil(train.epochs * loader.rows_per_epoch / loader.rows_per_step))


def _remarks(
    settings: command_settings.TrainingSettings, steps: int, epoch_tokens: int, truncated: int = 0
) -> list[str]:
    """What is allowed, and probably not meant."""
    train, key, found = settings.train, f"train.{settings.stage}", []
    if isinstance(train, config.ChatStage) and steps < FEW_STEPS:
        found.append(
            f"only {steps} step{'s' * (steps > 1)}: an epoch of {key}.mixture has {epoch_tokens:,} tokens, a step takes "
            f"{train.tokens_per_step:,}. More conversations, more epochs or a smaller tokens_per_step give more"
        )
    if truncated:
        found.append(
            f"{truncated:,} conversations are longer than {key}.sequence_length = {train.sequence_length} and were cut"
        )
    if train.profile_steps and train.profile_steps[0] > steps:
        found.append(
            f"{key}.profile_steps = {train.profile_steps}: the training ends at step {steps:,}, nothing is traced"
        )
    return found


def _fingerprint(settings: command_settings.TrainingSettings, checksums: dict[str, Any]) -> str:
    """Digest of all that decides the weights. Neither the ranks nor the micro-batch are in it: they change only rounding."""
    text = json.dumps({"settings": settings.decisive(), "inputs": checksums}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _metrics(
    settings: command_settings.TrainingSettings, trainer: Trainer, ranks: World, padding_fraction: float
) -> dict:
    """The contract's keys. tokens_per_second and mfu are of the steps alone; seconds is the wall clock of all attempts, as
    far as the checkpoints know of them."""
    history, sizes = trainer.history, trainer.model.config
    speed = history.tokens / max(history.useful_seconds, 1e-9)
    name = hardware.device_name(ranks.device)
    peak = hardware.peak_flops(name, trainer.model.compute_dtype)
    flops = hardware.flops_per_token(
        trainer.model.matmul_parameters(), sizes.depth, sizes.width, trainer.loader.sequence_length
    )
    return {
        "stage": settings.stage,
        "steps": trainer.step,
        "steps_planned": trainer.steps,
        "tokens": history.tokens,
        "target_tokens": history.target_tokens,
        "seconds": history.seconds,
        "useful_seconds": history.useful_seconds,
        "startup_seconds": history.startup_seconds,
        "compile_seconds": history.compile_seconds,
        "loader_seconds": history.loader_seconds,
        "checkpoint_seconds": history.checkpoint_seconds,
        "checkpoint_write_seconds": history.checkpoint_write_seconds,
        "validation_seconds": history.validation_seconds,
        "tokens_per_second": speed,
        "mfu": speed * flops / (peak * ranks.size) if peak else None,
        "peak_memory_bytes": history.peak_memory_bytes,
        "gpu_utilization": history.gpu_utilization,
        "device": name,
        "gpus": ranks.size if ranks.device.type == "cuda" else 0,
        "dtype": str(trainer.model.compute_dtype).removeprefix("torch."),
        "compiled": trainer.compiled,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "matmul_parameters": trainer.model.matmul_parameters(),
        "loss_first": history.loss_first,
        "loss_last": history.loss_last,
        "val_bpb": history.val_bpb[-1][1] if history.val_bpb else None,
        "val_bpb_curve": [{"step": step, "val_bpb": bpb} for step, bpb in history.val_bpb],
        "padding_fraction": padding_fraction,
        "truncated_conversations": trainer.loader.truncated,
        "restarts": history.restarts,
        "skipped_steps": history.skipped_steps,
        "commit": version.commit(),
        "torch": torch.__version__,
        "fingerprint": trainer.fingerprint,
    }


def _leave(code: int, ranks: World) -> int:
    """End now where other ranks wait in a collective: leaving in good order would wait for them for ever."""
    if ranks.size > 1:
        sys.stderr.flush()
        os._exit(code)
    return code
