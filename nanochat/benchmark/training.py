"""A training step, as the study did it and then with one thing more in each row (study_compiled stands beside them).

study             base: 32 rows of text a micro-batch; sft: 4 conversations, each padded to a row of its own. Kernels launched one by
                  one, float32 logits of all tokens at once
study_compiled    the same through torch.compile, model and loss as one graph; only where a compiler works
loss_in_slices    float32 logits exist for a slice of the tokens alone
plan_batch_size   the micro-batch of the batch-size plan
packed_rows       sft: whole conversations packed in rows, as the trainer does
compile           the blocks compiled, the loss in slices as it was; only where a compiler works
fused_loss, fused_projection, fused_mlp   base: this package's Triton kernels, one after the other; only where they run
kernels           sft: all of them
heads_of_128      base: another model of the same size, for its attention

All rows use this package's model and optimizer and do the same work for an optimizer step: as many rows of tokens, split
into micro-batches of the case's size, forward, backward, update. `tokens_per_second` counts all places,
`real_tokens_per_second` those that hold text: padding is work without a result.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import hardware
from nanochat.benchmark.timing import repeat, spread
from nanochat.command_settings import BenchmarkSettings
from nanochat.config import Optimizer as OptimizerSettings
from nanochat.data.conversation_files import Conversations
from nanochat.data.packing import pack
from nanochat.model.compiled import CompiledLoss
from nanochat.model.gpt import GPT
from nanochat.model.kernels import KERNELS, fused, only_kernels
from nanochat.model.optimizer import Optimizer
from nanochat.progress import say

STUDY_ROWS = {"cuda": {"base": 32, "sft": 4}, "cpu": {"base": 8, "sft": 4}}
SMALLEST_BATCH_SIZE, LARGEST_BATCH_SIZE = 4, {"cuda": 256, "cpu": 8}
BUDGET_SECONDS = {"cuda": 4.0, "cpu": 0.6}  # of one case
HEAD_DIM = 128


class Rows:
    """Texts as rows of T + 1 tokens: one each, or packed."""

    def __init__(self, conversations: list[np.ndarray], sequence_length: int, packed: bool, pad_id: int):
        length = sequence_length + 1
        lengths = [len(conversation) for conversation in conversations]
        places = pack(lengths, length).rows if packed else [[i] for i in range(len(conversations))]
        self.tokens = np.full((len(places), length), pad_id, dtype=np.int64)
        self.real = np.zeros((len(places), length), dtype=bool)
        for row, members in enumerate(places):
            at = 0
            for member in members:
                ids = conversations[member][:length]
                self.tokens[row, at : at + len(ids)] = ids
                self.real[row, at : at + len(ids)] = True
                at += len(ids)

    @classmethod
    def of_one_text(cls, conversations: list[np.ndarray], sequence_length: int) -> "Rows":
        """All of them as one long text, cut in rows: no padding, as in pretraining."""
        text, length = np.concatenate(conversations), sequence_length + 1
        text = np.resize(text, max(len(text) // length, 1) * length)
        return cls(list(text.reshape(-1, length)), sequence_length, packed=False, pad_id=0)

    @property
    def sequence_length(self) -> int:
        return self.tokens.shape[1] - 1

    def batches(self, rows: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """inputs, targets (rows, T) for ever; no loss on padding."""
        # All of them lie on the device: loading is no part of what is compared.
        tokens = torch.from_numpy(self.tokens).to(device)
        targets = torch.from_numpy(np.where(self.real, self.tokens, -1)).to(device)
        for first in itertools.count(0, rows):
            index = torch.arange(first, first + rows, device=device) % len(tokens)
            yield tokens[index, :-1], targets[index, 1:]

    @property
    def real_fraction(self) -> float:
        """Of all places in the inputs, those that hold text."""
        return float(self.real[:, :-1].mean())


@dataclass(frozen=True)
class Case:
    """How a step is done. rows_per_step: rows of an optimizer step, the same for all cases that are compared."""

    name: str
    stage: str
    rows: Rows
    device_batch_size: int
    rows_per_step: int
    plain_loss: bool = False
    compiled: bool = False
    kernels: tuple[str, ...] = ()


def measure(
    model: GPT,
    conversations: list[np.ndarray],
    sequence_length: int,
    steps: int,
    plan_batch_size: int | None,
    compile: bool,
    pad_id: int = 0,
    only: Collection[str] = (),
) -> Iterator[dict]:
    """The rows of benchmark/training.json, one by one. `model` holds float32 weights and is trained on.

    conversations    token ids of each, (n,) ints
    plan_batch_size  None: the fastest power of two that fits, found here
    only             of the stages and cases these alone (sft, study_compiled); empty: all
    """
    text = Rows.of_one_text(conversations, sequence_length)
    plan = plan_batch_size or _fastest_batch_size(model, text)
    for case in cases(model, conversations, text, plan, compile, pad_id):
        if only and not {case.stage, case.name} & set(only):
            continue
        own = _with_heads_of_128(model) if case.name == "heads_of_128" else model
        try:
            row = measure_case(case, own, steps)
        except torch.OutOfMemoryError:
            say("benchmark training", f"{case.stage}, {case.name}: {case.device_batch_size} rows do not fit")
            continue
        what, rate = f"{case.stage}, {case.name}: {case.device_batch_size} rows", row["real_tokens_per_second"]
        say("benchmark training", f"{what}, {rate:,.0f} tokens of text/s")
        yield row


def cases(
    model: GPT, conversations: list[np.ndarray], text: Rows, plan: int, compile: bool, pad_id: int
) -> Iterator[Case]:
    """Each with one thing more than the one before it, from the study's on, but study_compiled, which is beside them; base, then sft."""
    study, length = STUDY_ROWS[model.device.type], text.sequence_length
    rows_per_step = math.lcm(plan, *study.values())
    stream = torch.empty(1, model.config.width, dtype=model.compute_dtype, device=model.device)
    kernels = tuple(kernel for kernel in KERNELS if fused(kernel, stream))

    case = Case("study", "base", text, study["base"], rows_per_step, plain_loss=True)
    yield case
    if compile:
        yield replace(case, name="study_compiled", compiled=True)
    yield (case := replace(case, name="loss_in_slices", plain_loss=False))
    yield (case := replace(case, name="plan_batch_size", device_batch_size=plan))
    if compile:
        yield (case := replace(case, name="compile", compiled=True))
    for kernel in kernels:
        yield (case := replace(case, name=f"fused_{kernel}", kernels=(*case.kernels, kernel)))
    config = model.config
    smaller = config.heads == config.kv_heads and config.width // config.heads < HEAD_DIM
    if model.device.type == "cuda" and smaller and config.width % HEAD_DIM == 0:
        yield replace(case, name="heads_of_128")

    alone = Rows(conversations, length, packed=False, pad_id=pad_id)
    case = Case("study", "sft", alone, study["sft"], rows_per_step, plain_loss=True)
    yield case
    if compile:
        yield replace(case, name="study_compiled", compiled=True)
    yield (case := replace(case, name="loss_in_slices", plain_loss=False))
    yield (case := replace(case, name="plan_batch_size", device_batch_size=plan))
    packed = Rows(conversations, length, packed=True, pad_id=pad_id)
    yield (case := replace(case, name="packed_rows", rows=packed))
    if compile:
        yield (case := replace(case, name="compile", compiled=True))
    if kernels:
        yield replace(case, name="kernels", kernels=kernels)


def measure_case(case: Case, model: GPT, steps: int) -> dict:
    """A row of training.json. `first_step_seconds` includes compiling, with whatever is in the compiler's cache."""
    device, config, length = model.device, model.config, case.rows.sequence_length
    # What was compiled for other cases is no part of this one.
    torch.compiler.reset()
    with only_kernels(*case.kernels):
        step = TrainingStep(model, case)
        first = repeat(step, device, 1, 0.0, warmup=0)[0]
        hardware.reset_peak_memory(device)  # trying kernels out took memory of its own
        seconds = repeat(step, device, steps, BUDGET_SECONDS[device.type])
    median = statistics.median(seconds)
    rate = case.device_batch_size * step.micro_steps * length / median
    flops = hardware.flops_per_token(model.matmul_parameters(), config.depth, config.width, length)
    peak = hardware.peak_flops(hardware.device_name(device), model.compute_dtype)
    return {
        "case": case.name,
        "stage": case.stage,
        "depth": config.depth,
        "width": config.width,
        "heads": config.heads,
        "device_batch_size": case.device_batch_size,
        "grad_accum_steps": step.micro_steps,
        "sequence_length": length,
        "vocab_size": config.vocab_size,
        "compile": case.compiled,
        "kernels": " ".join(case.kernels) or "none",
        "tokens_per_second": rate,
        "real_tokens_per_second": rate * case.rows.real_fraction,
        "padding_fraction": 1 - case.rows.real_fraction,
        "mfu": flops * rate / peak if peak else None,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - median) if case.compiled else 0.0,
        "spread": spread(seconds),
        "steps": len(seconds),
    }


class TrainingStep:
    """Forward and backward over the micro-batches, then the update: the trainer's arithmetic without its bookkeeping."""

    def __init__(self, model: GPT, case: Case):
        self.micro_steps = max(1, case.rows_per_step // case.device_batch_size)
        self.batches = case.rows.batches(case.device_batch_size, model.device)
        compile_update = case.compiled and model.device.type == "cuda"
        self.optimizer = Optimizer(model, OptimizerSettings(), compile=compile_update)
        self.loss: Callable[..., Tensor] = model
        if case.plain_loss:
            self.loss = partial(_plain_loss, model)
        if case.compiled:
            self.loss = torch.compile(self.loss, dynamic=False) if case.plain_loss else CompiledLoss(model)

    def __call__(self) -> None:
        batches = [next(self.batches) for _ in range(self.micro_steps)]
        self.optimizer.zero_gradients()
        # One loss over the whole step, whatever the micro-batches: each target weighs the same.
        count = sum((targets >= 0).sum() for _, targets in batches).clamp_min(1)
        for inputs, targets in batches:
            (self.loss(inputs, targets, reduction="sum") / count).backward()
        float(self.optimizer.reduce_gradients())  # the trainer looks at it too: its one wait in a step
        # A scale of 0 does all the work of an update and leaves the weights, so that the cases start alike.
        self.optimizer.step(0, 0.0)


def _plain_loss(model: GPT, inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """From the float32 logits of all tokens at once."""
    logits = model(inputs).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction=reduction)


def _with_heads_of_128(model: GPT) -> GPT:
    """The same weights, cut into fewer heads."""
    heads = model.config.width // HEAD_DIM
    other = GPT(dataclasses.replace(model.config, heads=heads, kv_heads=heads))
    other.load_state_dict(model.state_dict())
    other.compute_dtype = model.compute_dtype
    return other.to(model.device)


def _fastest_batch_size(model: GPT, rows: Rows) -> int:
    """Doubling until it no longer fits or no longer pays."""
    best, best_rate, size = SMALLEST_BATCH_SIZE, 0.0, SMALLEST_BATCH_SIZE
    while size <= LARGEST_BATCH_SIZE[model.device.type]:
        try:
            step = TrainingStep(model, Case("search", "base", rows, size, size))
            rate = size / statistics.median(repeat(step, model.device, 3, BUDGET_SECONDS[model.device.type] / 4))
        except torch.OutOfMemoryError:
            break
        if rate < 1.01 * best_rate:
            break
        best, best_rate, size = size, rate, 2 * size
    return best


def conversations_of(settings: BenchmarkSettings, folder: str | None, most: int = 2000) -> tuple[list[np.ndarray], int]:
    """The first conversations of a stage's training split, without a folder random ones; and the padding token."""
    if folder is None:
        return synthetic_conversations(settings.vocab_size, settings.sequence_length, settings.seed, most), 0
    stored = Conversations.open(folder, "train")
    return [np.asarray(stored.read(i)[0]) for i in range(min(most, len(stored)))], stored.pad_id


def synthetic_conversations(vocab_size: int, sequence_length: int, seed: int, count: int) -> list[np.ndarray]:
    """Random tokens with the lengths of short chats: log-normal, median 90 tokens, a tail to the whole row."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(90), 0.8, count).astype(int), 8, sequence_length)
    return [random.integers(0, vocab_size, length) for length in lengths]
