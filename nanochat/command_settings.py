"""What each command receives, cut out of the settings of a run: a stage depends on its own and nothing global."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from nanochat.config import (
    TRAINED_STAGES,
    Base,
    BatchSize,
    Benchmark,
    ChatStage,
    Config,
    Corpus,
    Cost,
    Evaluate,
    Model,
    Optimizer,
    Settings,
    Source,
    Tokenizer,
    Tokens,
)


class CorpusSettings(Settings):
    seed: int
    corpus: Corpus

    def decisive(self) -> dict[str, Any]:
        """Without what only other sources read."""
        read_by = {"directory": {"paths"}, "huggingface": {"repo_id", "pattern", "revision"}}
        unread = {key for source, keys in read_by.items() if source != self.corpus.source for key in keys}
        return self.model_dump(mode="json", exclude={"corpus": unread})


class TokenizerSettings(Settings):
    tokenizer: Tokenizer
    text_column: str


class TokensSettings(Settings):
    neutral: ClassVar = {"tokens": {"workers"}}
    tokens: Tokens


class ConversationsSettings(Settings):
    stage: Literal["mid", "sft"]
    seed: int
    mixture: list[Source]


class PlanSettings(Settings):
    """Only what decides how much memory and time a micro-batch takes."""

    neutral: ClassVar = {"batch_size": {"cache", "probe_timeout_seconds"}}
    stage: Literal["base", "mid", "sft"]
    model: Model
    vocab_size: int
    gpus: int
    ranks: int = 1  # processes that share a step; never fewer than GPUs
    sequence_length: int
    tokens_per_step: int
    device_batch_size: int | None
    dtype: Literal["auto", "bfloat16", "float32"]
    compile: Literal["auto", "on", "off"]
    batch_size: BatchSize


class TrainingSettings(Settings):
    # A run may go on from a checkpoint that was made with others. A finished stage stays as it is when they change, but for those
    # that make its plan anew too (PlanSettings): GPUs, nodes, rows, compile.
    neutral: ClassVar = {
        "compile": True,
        "on_nonfinite": True,
        "trackers": True,
        "train": {
            "gpus",
            "nodes",
            "device_batch_size",
            "validate_every_steps",
            "validation_tokens",
            "checkpoint_every_seconds",
            "keep_checkpoints",
            "profile_steps",
        },
    }
    stage: Literal["base", "mid", "sft"]
    seed: int
    model: Model
    vocab_size: int
    dtype: Literal["auto", "bfloat16", "float32"]
    compile: Literal["auto", "on", "off"]
    on_nonfinite: Literal["stop", "skip"]
    trackers: list[Literal["tensorboard", "wandb"]] = Field([])
    optimizer: Optimizer
    train: Base | ChatStage

    @classmethod
    def for_measuring(
        cls,
        model: Model,
        vocab_size: int,
        dtype: str,
        compile: str,
        seed: int,
        on_nonfinite: str = "stop",
        **train: Any,
    ) -> "TrainingSettings":
        """Of a training of which only measurements stay: its last checkpoint is the only one, unless it is told to save.

        train  settings of the stage, as of `Base`
        """
        return cls(
            stage="base",
            seed=seed,
            model=model,
            vocab_size=vocab_size,
            dtype=dtype,
            compile=compile,
            on_nonfinite=on_nonfinite,
            optimizer=Optimizer(),
            train=Base(checkpoint_every_seconds=1e9, keep_checkpoints=1, **train),
        )


class EvaluationSettings(Settings):
    seed: int
    dtype: Literal["auto", "bfloat16", "float32"]
    evaluate: Evaluate


class BenchmarkSettings(Settings):
    neutral: ClassVar = {"benchmark": {"names"}}  # each benchmark is a job of its own
    seed: int
    model: Model
    vocab_size: int
    sequence_length: int
    dtype: Literal["auto", "bfloat16", "float32"]
    compile: Literal["auto", "on", "off"]
    benchmark: Benchmark


class ReportSettings(Settings):
    cost: Cost


def stage_settings(config: Config) -> dict[str, Settings]:
    """What each stage depends on; a key is the name of its file below `results/config/`."""
    train = config.train
    # The window is the base model's: later stages have other lengths of row, and start from its weights.
    model = config.model.resolved(train.base.sequence_length)
    settings: dict[str, Settings] = {
        "corpus": CorpusSettings(seed=config.seed, corpus=config.corpus),
        "tokenizer": TokenizerSettings(tokenizer=config.tokenizer, text_column=config.corpus.text_column),
        "tokens": TokensSettings(tokens=config.tokens),
        "evaluate": EvaluationSettings(seed=config.seed, dtype=train.dtype, evaluate=config.evaluate),
        "benchmark": BenchmarkSettings(
            seed=config.seed,
            model=model,
            vocab_size=config.tokenizer.vocab_size,
            sequence_length=train.base.sequence_length,
            dtype=train.dtype,
            compile=train.compile,
            benchmark=config.benchmark,
        ),
        "report": ReportSettings(cost=config.cost),
    }
    for stage in TRAINED_STAGES:
        own: Base | ChatStage = getattr(train, stage)
        settings[f"batch_size_{stage}"] = PlanSettings(
            stage=stage,
            model=model,
            vocab_size=config.tokenizer.vocab_size,
            gpus=own.gpus,
            ranks=own.ranks,
            sequence_length=own.sequence_length,
            tokens_per_step=own.tokens_per_step,
            device_batch_size=own.device_batch_size,
            dtype=train.dtype,
            compile=train.compile,
            batch_size=config.batch_size,
        )
        settings[stage] = TrainingSettings(
            stage=stage,
            seed=config.seed,
            model=model,
            vocab_size=config.tokenizer.vocab_size,
            dtype=train.dtype,
            compile=train.compile,
            on_nonfinite=train.on_nonfinite,
            trackers=train.trackers,
            optimizer=train.optimizer,
            train=own,
        )
        if not isinstance(own, Base):
            settings[f"conversations_{stage}"] = ConversationsSettings(
                stage=stage, seed=config.seed, mixture=own.mixture
            )
    return settings
