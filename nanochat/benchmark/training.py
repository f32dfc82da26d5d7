"""A training step, as the study did it and then with one thing more in each row.

eager_small_batch   4 conversations a micro-batch, each padded to a row of its own, kernels launched one by one
plan_batch_size     the micro-batch of the batch-size plan
packed_rows         whole conversations packed in rows, as the trainer does
compile             the model compiled; only where a compiler works

All rows use this package's model, loss and optimizer and do the same work for an optimizer step: as many rows of tokens, split
into micro-batches of the case's size, forward, backward, update. `tokens_per_second` counts all places,
`real_tokens_per_second` those that hold text: padding is work without a result.
"""

import itertools
import statistics
from collections.abc import Iterator

import numpy as np
import torch

from nanochat import hardware
from nanochat.benchmark.timing import repeat, spread
from nanochat.config import Optimizer as OptimizerSettings
from nanochat.data.conversation_files import Conversations
from nanochat.data.packing import pack
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import Optimizer
from nanochat.progress import say
from nanochat.train.distributed import Gradients

STUDY_BATCH_SIZE = 4
LARGEST_BATCH_SIZE = 256
BUDGET_SECONDS = {"cuda": 30.0, "cpu": 5.0}  # of one case


class Rows:
    """Conversations as rows of T + 1 tokens: one each, or packed."""

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

    def batches(self, rows: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """inputs, targets (rows, T) for ever; no loss on padding."""
        order = itertools.cycle(range(len(self.tokens)))
        while True:
            index = list(itertools.islice(order, rows))
            tokens = torch.from_numpy(self.tokens[index]).to(device)
            targets = torch.from_numpy(np.where(self.real, self.tokens, -1)[index]).to(device)
            yield tokens[:, :-1], targets[:, 1:].contiguous()

    @property
    def real_fraction(self) -> float:
        """Of all places in the inputs, those that hold text."""
        return float(self.real[:, :-1].mean())


def measure(
    model: GPT,
    conversations: list[np.ndarray],
    sequence_length: int,
    steps: int,
    plan_batch_size: int | None,
    compile: bool,
    pad_id: int = 0,
) -> list[dict]:
    """The rows of benchmark/training.json. `model` holds float32 weights and is trained on.

    conversations    token ids of each, (n,) ints
    plan_batch_size  None: the fastest power of two that fits, found here
    """
    alone = Rows(conversations, sequence_length, packed=False, pad_id=pad_id)
    packed = Rows(conversations, sequence_length, packed=True, pad_id=pad_id)
    plan = plan_batch_size or _fastest_batch_size(model, packed)
    small = min(STUDY_BATCH_SIZE, plan)
    cases = [
        ("eager_small_batch", small, alone, False),
        ("plan_batch_size", plan, alone, False),
        ("packed_rows", plan, packed, False),
    ]
    if compile:
        cases.append(("compile", plan, packed, True))
    results = []
    for case, batch_size, rows, compiled in cases:
        results.append(_row(case, model, rows, batch_size, max(1, plan // batch_size), steps, compiled))
        rate = results[-1]["real_tokens_per_second"]
        say("benchmark training", f"{case}: {batch_size} rows, {rate:,.0f} tokens of text/s")
    return results


def _row(case: str, model: GPT, rows: Rows, batch_size: int, micro_steps: int, steps: int, compiled: bool) -> dict:
    device = model.device
    step = TrainingStep(model, rows, batch_size, micro_steps, compiled)
    hardware.reset_peak_memory(device)
    # The first step compiles; it is timed apart.
    first = repeat(step, device, 1, 0.0, warmup=0)[0]
    seconds = repeat(step, device, steps, BUDGET_SECONDS[device.type])
    median = statistics.median(seconds)
    sequence_length = rows.tokens.shape[1] - 1
    rate = batch_size * micro_steps * sequence_length / median
    config = model.config
    flops = hardware.flops_per_token(model.matmul_parameters(), config.depth, config.width, sequence_length)
    peak = hardware.peak_flops(hardware.device_name(device), model.compute_dtype)
    return {
        "case": case,
        "depth": config.depth,
        "width": config.width,
        "device_batch_size": batch_size,
        "grad_accum_steps": micro_steps,
        "sequence_length": sequence_length,
        "vocab_size": config.vocab_size,
        "compile": compiled,
        "tokens_per_second": rate,
        "real_tokens_per_second": rate * rows.real_fraction,
        "padding_fraction": 1 - rows.real_fraction,
        "mfu": flops * rate / peak if peak else None,
        "peak_memory_bytes": hardware.peak_memory_bytes(device),
        "first_step_seconds": first,
        "spread": spread(seconds),
        "steps": len(seconds),
    }


class TrainingStep:
    """Forward and backward over the micro-batches, then the update: the trainer's arithmetic without its bookkeeping."""

    def __init__(self, model: GPT, rows: Rows, batch_size: int, micro_steps: int, compiled: bool):
        self.model, self.micro_steps = model.train(), micro_steps
        self.batches = rows.batches(batch_size, model.device)
        self.gradients = Gradients(list(model.parameters()))
        self.optimizer = Optimizer(model, OptimizerSettings())
        self.loss = torch.compile(model, dynamic=False) if compiled else model

    def __call__(self) -> None:
        batches = [next(self.batches) for _ in range(self.micro_steps)]
        self.gradients.zero()
        # One loss over the whole step, whatever the micro-batches: each target weighs the same.
        count = sum((targets >= 0).sum() for _, targets in batches).clamp_min(1)
        for inputs, targets in batches:
            (self.loss(inputs, targets, reduction="sum") / count).backward()
        float(self.gradients.norm())  # the trainer looks at it before it updates: its one wait in a step
        # A scale of 0 does all the work of an update and leaves the weights, so that the cases start alike.
        self.optimizer.step(0, 0.0)


def _fastest_batch_size(model: GPT, rows: Rows) -> int:
    """Doubling from 4 until it no longer fits or no longer pays."""
    best, best_rate, size = STUDY_BATCH_SIZE, 0.0, STUDY_BATCH_SIZE
    while size <= LARGEST_BATCH_SIZE:
        try:
            step = TrainingStep(model, rows, size, 1, compiled=False)
            rate = size / statistics.median(repeat(step, model.device, 3, 2.0))
        except torch.OutOfMemoryError:
            break
        if rate < 1.01 * best_rate:
            break
        best, best_rate, size = size, rate, 2 * size
    return best


def load_conversations(folder: str, most: int = 2000) -> tuple[list[np.ndarray], int]:
    """The first conversations of a stage's training split, and its padding token."""
    stored = Conversations.open(folder, "train")
    return [np.asarray(stored.read(i)[0]) for i in range(min(most, len(stored)))], stored.pad_id


def synthetic_conversations(vocab_size: int, sequence_length: int, seed: int, count: int = 2000) -> list[np.ndarray]:
    """Random tokens with the lengths of short chats: log-normal, median 90 tokens, a tail to the whole row."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(90), 0.8, count).astype(int), 8, sequence_length)
    return [random.integers(0, vocab_size, length) for length in lengths]
