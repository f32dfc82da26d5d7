"""Every setting of a run: typed, bounded, documented once.

`config.yaml` at the repository's root is rendered from the descriptions here (`nanochat config`), the JSON schema of the
workflow too (`nanochat schema`). A stage does not see the whole: `command_settings` cuts out what one depends on, the
workflow writes it to `results/config/<stage>.json`, and a change of that file is what makes the stage run again.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

TRAINED_STAGES = ("base", "mid", "sft")
ADDITIONS = ("value_embeddings", "smear", "windows")
# Positions that a model has, as a multiple of the length it is trained on: a chat may grow beyond a training row.
ROTARY_REACH = 8
WINDOW_PARTS = 4  # a window is one of so many parts of the length that the base model trains on

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    # Keys that decide how the work goes and not what comes of it, nested as the settings are.
    neutral: ClassVar[dict[str, Any]] = {}

    def decisive(self) -> dict[str, Any]:
        """The settings, as JSON, without the neutral ones: where these are the same, so is the result."""
        return self.model_dump(mode="json", exclude=self.neutral)


class Corpus(Settings):
    """Where the raw text comes from."""

    source: Literal["bundled", "directory", "huggingface"] = Field(
        "huggingface",
        description="bundled: 249 US presidential annual messages, inside the package. directory: your own files (`paths`). "
        "huggingface: a dataset repository (`repo_id`, `pattern`, `revision`).",
    )
    paths: list[str] = Field(
        [],
        description="source directory: files, folders or globs of .parquet, .jsonl and .txt; relative to the repository's root.",
    )
    repo_id: str = Field(
        "karpathy/fineweb-edu-100b-shuffle", description="source huggingface: the dataset's repository."
    )
    pattern: str = Field("shard_00[01]??.parquet", description="source huggingface: which of its files; a glob.")
    revision: str = Field(
        "main", description="source huggingface: branch, tag or commit. A commit makes the run repeatable."
    )
    text_column: str = Field(
        "text", description="Column of a parquet file, or key of a JSON line, that holds a document's text."
    )
    validation_fraction: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="Share of the documents held out: no training shard has them, all scores are taken on them.",
    )
    shard_bytes: PositiveInt = Field(
        100_000_000, description="Text in one shard, bytes of UTF-8, at most (one document at least)."
    )
    max_bytes: int | None = Field(
        None, gt=0, description="Use no more text than this, bytes of UTF-8. Empty: all of it."
    )


class Tokenizer(Settings):
    """Byte-level BPE."""

    vocab_size: int = Field(
        65_536,
        ge=270,
        le=2**20,
        description="Entries, special tokens included. At most 65,536 fit the 2-byte token shards.",
    )
    train_bytes: PositiveInt = Field(
        2_000_000_000, description="Text that the merges are learnt from, bytes of UTF-8, at most."
    )


class Tokens(Settings):
    """Encoding the corpus once, on CPUs."""

    workers: int = Field(
        0, ge=0, description="Processes that encode shards side by side. 0: one for each CPU of the job."
    )


class Model(Settings):
    """nanochat's family: one dial."""

    depth: PositiveInt = Field(
        20, description="Layers. Width, heads, learning rates and the training horizon follow from it."
    )
    aspect_ratio: PositiveInt = Field(
        64, description="Width a layer: width = depth x aspect_ratio, rounded up to whole heads."
    )
    head_dim: int = Field(128, ge=2, multiple_of=2, description="Width of an attention head.")
    width: int | None = Field(None, gt=0, description="Instead of depth x aspect_ratio. Empty: derived.")
    heads: int | None = Field(
        None, gt=0, description="Attention heads; must divide the width. Empty: width / head_dim."
    )
    kv_heads: int | None = Field(
        None,
        gt=0,
        description="Heads of keys and values (grouped-query attention); must divide the heads. Empty: as many as heads.",
    )
    logit_softcap: float = Field(
        15.0, gt=0, le=70, description="Logits are squashed to this range: softcap x tanh(logits / softcap)."
    )
    rope_base: float = Field(10_000.0, gt=0, description="Base of the rotary embedding's frequencies.")

    additions: list[Literal["value_embeddings", "smear", "windows"]] = Field(
        list(ADDITIONS),
        description="What the model has beside the plain transformer. value_embeddings: every second layer adds a token embedding of "
        "its own to its values. smear: each token takes a share of the one before. windows: three layers of four attend to the last "
        "`window` tokens alone. Empty: nothing.",
    )
    window: int | None = Field(
        None,
        gt=0,
        description="Tokens that a layer with a window sees, in every stage. Empty: a quarter of train.base.sequence_length.",
    )

    def resolved(self, sequence_length: int | None = None) -> "Model":
        """The same model with `width`, `heads` and `kv_heads` filled in; with the base model's sequence length, `window` too."""
        width = self.width
        if width is None:
            width = -(-self.depth * self.aspect_ratio // self.head_dim) * self.head_dim
        heads = self.heads or max(1, width // self.head_dim)
        window = self.window
        if "windows" not in self.additions:
            window = None
        elif window is None and sequence_length is not None:
            window = window_of(sequence_length)
        sizes = {"width": width, "heads": heads, "kv_heads": self.kv_heads or heads, "window": window}
        return self.model_copy(update=sizes)


def window_of(sequence_length: int) -> int:
    """The window, in tokens, that follows from the base model's sequence length."""
    return max(1, sequence_length // WINDOW_PARTS)


class Optimizer(Settings):
    """Muon for the matrices of the blocks, AdamW for embeddings, head and scalars."""

    matrix_learning_rate: float = Field(0.02, gt=0, description="Muon, per update of unit spectral norm.")
    embedding_learning_rate: float = Field(
        0.2, gt=0, description="AdamW, token embedding; scaled by sqrt(768 / width)."
    )
    unembedding_learning_rate: float = Field(
        0.004, gt=0, description="AdamW, output head; scaled by sqrt(768 / width)."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled, on the matrices.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's; it starts at 0.85 and is there after 300 steps.")


class Stage(Settings):
    """What the three trained stages have in common."""

    gpus: int = Field(4, ge=0, description="GPUs of the job. 0: train on the CPU.")
    nodes: PositiveInt = Field(1, description="Nodes that they are on, the same number on each.")
    sequence_length: int = Field(2048, ge=16, description="Tokens in a row.")
    tokens_per_step: PositiveInt = Field(
        524_288,
        description="Tokens that an optimizer step sees over all GPUs. The batch-size plan splits it into micro-batches; it never changes it.",
    )
    device_batch_size: int | None = Field(
        None, gt=0, description="Rows of a micro-batch on one GPU. Empty: measured (stage batch_size)."
    )
    learning_rate_scale: float = Field(
        1.0, gt=0, description="Multiplies all learning rates of `train.optimizer` in this stage."
    )
    warmup_fraction: Fraction = Field(0.0, description="Share of the steps over which the learning rate rises from 0.")
    decay_fraction: Fraction = Field(0.5, description="Share of the steps, at the end, over which it falls linearly.")
    final_learning_rate_fraction: Fraction = Field(0.0, description="Where it ends, as a share of its peak.")
    validate_every_steps: PositiveInt = Field(250, description="Steps between two measurements of the validation loss.")
    validation_tokens: PositiveInt = Field(10_485_760, description="Held-out tokens in such a measurement, at most.")
    checkpoint_every_seconds: float = Field(600.0, ge=0, description="What a lost node can cost at most.")
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints kept on disk.")
    profile_steps: list[PositiveInt] = Field([], description="[first, last] step to trace with torch's profiler.")

    @property
    def ranks(self) -> int:
        """Processes that share a step: one a GPU; on CPUs one a node."""
        return max(self.gpus, self.nodes)

    @field_validator("profile_steps")
    @classmethod
    def _first_and_last(cls, steps: list[int]) -> list[int]:
        if steps and (len(steps) != 2 or steps[0] > steps[1]):
            raise PydanticCustomError("steps", "must be [first, last], the first not after the last, or empty")
        return steps


class Base(Stage):
    """Pretraining on the corpus."""

    tokens_per_parameter: float = Field(
        20.0,
        gt=0,
        description="Training horizon; 20 is compute-optimal (Hoffmann et al. 2022). Parameters: those of matrix products; token and value "
        "embeddings are left out.",
    )
    steps: int | None = Field(
        None, gt=0, description="Optimizer steps, instead of the horizon. Empty: from tokens_per_parameter."
    )


MIXTURE = (
    "Conversations to train on: a list of {name, conversations, path}. chatterbot, identity, corpus_facts, spelling, arithmetic and "
    "multiple_choice come with the package; jsonl is your own file at `path`, a JSON list of {role, content} on each line. "
    "conversations: how many; generated ones are made, others sampled, repeated when there are fewer. Empty: each once, and 1,000 of "
    "those made without an end."
)


class Source(Settings):
    """One source of conversations in a mixture."""

    name: Literal["chatterbot", "identity", "corpus_facts", "spelling", "arithmetic", "multiple_choice", "jsonl"] = (
        Field(
            description="chatterbot, identity, corpus_facts, spelling, arithmetic and multiple_choice come with the package; "
            "jsonl is your own file: a JSON list of {role, content} on each line."
        )
    )
    path: str | None = Field(None, description="name jsonl: the file.")
    conversations: int | None = Field(
        None,
        gt=0,
        description="How many; generated ones are made, others are sampled (repeated when there are fewer). Empty: each once; of those made without an end, 1,000.",
    )


def _sources(**counts: int | None) -> list[Source]:
    return [Source(name=name, conversations=count) for name, count in counts.items()]


class ChatStage(Stage):
    """Training on conversations."""

    mixture: list[Source] = Field(min_length=1, description=MIXTURE)
    epochs: float = Field(1.0, gt=0, description="Passes over the mixture.")


class Mid(ChatStage):
    """Midtraining: the chat format, multiple choice, tool use. Loss on every token."""

    mixture: list[Source] = Field(
        _sources(
            chatterbot=20_000,
            identity=2_000,
            corpus_facts=None,
            spelling=80_000,
            arithmetic=80_000,
            multiple_choice=100_000,
        ),
        min_length=1,
        description=MIXTURE,
    )


class Sft(ChatStage):
    """Supervised finetuning on conversations, loss on the assistant's tokens only."""

    mixture: list[Source] = Field(
        _sources(
            chatterbot=None, identity=1_000, corpus_facts=None, spelling=5_000, arithmetic=5_000, multiple_choice=5_000
        ),
        min_length=1,
        description="As for mid.",
    )
    learning_rate_scale: float = Field(
        0.1, gt=0, description="Multiplies all learning rates of `train.optimizer` in this stage."
    )
    decay_fraction: Fraction = Field(1.0, description="Share of the steps, at the end, over which it falls linearly.")
    tokens_per_step: PositiveInt = Field(65_536, description="As for base; small, since the mixture is.")


class Train(Settings):
    """The three trained stages."""

    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the matrix multiplications, bfloat16 or float32; weights stay float32. auto: bfloat16 where the device has it in "
        "hardware.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile: on, off, or auto, on for a GPU and off on a CPU."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="A loss or gradient that is not finite: stop the run before it reaches a checkpoint, or skip the step.",
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="Where to send curves, beside log.jsonl: tensorboard, wandb."
    )
    optimizer: Optimizer = Field(Optimizer(), description="Learning rates are those of a model of width 768.")
    base: Base = Field(Base(), description="Pretraining on the corpus.")
    mid: Mid = Field(Mid(), description="Midtraining: the chat format, multiple choice, tool use.")
    sft: Sft = Field(Sft(), description="Supervised finetuning, loss on the assistant's tokens only.")

    @field_validator("compile", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        """YAML takes a bare on or off for true or false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class BatchSize(Settings):
    """How the device batch size is found."""

    margin: float = Field(0.15, ge=0, lt=1, description="Share of the device's memory that the plan leaves free.")
    max_device_batch_size: PositiveInt = Field(512, description="Rows at which the search ends even if more would fit.")
    cache: str = Field(
        "~/.cache/nanochat-slurm/batch_size",
        description="Folder of what was measured before, by model, device and software. Empty: always measure.",
    )
    probe_timeout_seconds: float = Field(
        300.0, gt=0, description="A probe that takes longer is ended and counts as not fitting."
    )


class Evaluate(Settings):
    """What is measured after each trained stage."""

    gpus: int = Field(1, ge=0, description="GPUs of the job.")
    tasks: list[Literal["bits_per_byte", "cloze", "multiple_choice", "humaneval", "samples"]] = Field(
        ["bits_per_byte", "cloze", "multiple_choice", "humaneval", "samples"],
        min_length=1,
        description="Which tasks, in this order; these are all there are.",
    )
    items: PositiveInt = Field(500, description="Items of the cloze and of the multiple-choice task, each.")
    humaneval_problems: int = Field(164, ge=1, le=164, description="Of the 164 problems, the first so many.")
    humaneval_tokens: PositiveInt = Field(256, description="Longest completion of a problem.")
    validation_tokens: PositiveInt = Field(2_097_152, description="Held-out tokens for bits per byte, at most.")
    prompts: list[str] = Field(
        [
            "Fellow-citizens of the Senate and House of Representatives:",
            "The state of our Union is",
            "I recommend to the Congress",
        ],
        description="Prompts whose continuations stand in the report.",
    )
    questions: list[str] = Field(
        ["Hello! Who are you?", "How do you spell the word congress?", "What is 17 times 23?"],
        description="Questions to the chat model whose answers stand in the report.",
    )
    sample_tokens: PositiveInt = Field(120, description="Longest sampled continuation or answer.")
    temperature: float = Field(0.8, ge=0, description="Of the samples; 0 is greedy.")


class Benchmark(Settings):
    """Before/after measurements at the model's own size."""

    gpus: int = Field(1, ge=0, description="GPUs of the job.")
    names: list[Literal["training", "compile", "batch_size", "kv_cache", "first_token"]] = Field(
        ["training", "compile", "batch_size", "kv_cache", "first_token"],
        min_length=1,
        description="Which benchmarks; these are all there are.",
    )
    steps: PositiveInt = Field(20, description="Timed steps a row, after the warm-up; the median is reported.")
    batch_sizes: list[PositiveInt] = Field(
        [1, 4, 8, 16, 32, 64, 93, 128, 256], min_length=1, description="Rows decoded side by side (kv_cache)."
    )
    prompt_tokens: PositiveInt = Field(50, description="kv_cache: tokens of the prompt.")
    new_tokens: PositiveInt = Field(200, description="kv_cache: tokens decoded.")


class Cost(Settings):
    """Prices for the report."""

    gpu_hour_price: float = Field(3.0, ge=0, description="Of one GPU for one hour.")
    cpu_hour_price: float = Field(0.0, ge=0, description="Of one CPU core for one hour, in jobs that hold no GPU.")
    currency: str = Field("USD", min_length=1, description="Printed behind the amounts.")


class Config(Settings):
    """A run."""

    results: str = Field(
        "results", min_length=1, description="Folder of everything a run writes, relative to the repository's root."
    )
    seed: int = Field(1337, ge=0, lt=2**32, description="Of the weights, the order of the data and the samples.")
    corpus: Corpus = Field(Corpus(), description="Where the raw text comes from.")
    tokenizer: Tokenizer = Field(Tokenizer(), description="Byte-level BPE.")
    tokens: Tokens = Field(Tokens(), description="Encoding the corpus once, on CPUs.")
    model: Model = Field(Model(), description="nanochat's family: one dial.")
    train: Train = Field(Train(), description="The three trained stages.")
    batch_size: BatchSize = Field(BatchSize(), description="How the device batch size is found.")
    evaluate: Evaluate = Field(Evaluate(), description="What is measured after each trained stage.")
    benchmark: Benchmark = Field(Benchmark(), description="Before/after measurements at the model's own size.")
    cost: Cost = Field(Cost(), description="Prices for the report.")
