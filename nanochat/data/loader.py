"""Rows for training: a pure function of (seed, step), so that resuming needs nothing but the step.

Row i of step s is the same text whatever the number of ranks and the device batch size: rank and micro-batch only say which
of the step's rows to take. Every epoch shows each row once, in another order.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from nanochat.data.conversation_files import Conversations
from nanochat.data.packing import Packed, pack
from nanochat.data.token_shards import TokenShards
from nanochat.errors import UserError


class StepLoader(Protocol):
    """What the trainer needs to know of its data."""

    rows_per_step: int
    rows_per_epoch: int
    sequence_length: int

    def micro_batch(self, step: int, first_row: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: (rows, T) int64 each, rows `first_row` onwards of step `step`; target -1 carries no loss."""
        ...


class PretrainLoader:
    """Rows of T + 1 tokens cut from the corpus end to end (the last target is the next row's first input).

    seed None: rows in the order of the text, for validation; the first `spread` of them lie evenly over all of it, since a corpus of
    several sources has them one after the other.
    """

    truncated = 0  # no conversations, so none is cut

    def __init__(
        self, shards: TokenShards, rows_per_step: int, sequence_length: int, seed: int | None = 0, spread: int = 0
    ):
        self.shards, self.rows_per_step, self.sequence_length, self.seed = shards, rows_per_step, sequence_length, seed
        self.spread = spread
        self.rows_per_epoch = max(0, shards.total_tokens - 1) // sequence_length
        if self.rows_per_epoch < 1:
            raise UserError(
                f"{shards.folder}: {shards.total_tokens:,} tokens are too few for one row of sequence_length + 1 = "
                f"{sequence_length + 1:,}. Give more text, or a smaller train.base.sequence_length."
            )
        if seed is not None and self.rows_per_epoch < rows_per_step:
            raise UserError(
                f"train.base.tokens_per_step = {rows_per_step * sequence_length}: {shards.folder} holds "
                f"{self.rows_per_epoch * sequence_length:,} tokens to train on, less than one step. Give more text or a smaller step."
            )

    def row_index(self, step: int, first_row: int, rows: int) -> np.ndarray:
        """(rows,) int64: which rows of the corpus these are."""
        index = step * self.rows_per_step + np.arange(first_row, first_row + rows, dtype=np.int64)
        if self.seed is None and 0 < self.spread < self.rows_per_epoch:
            return index % self.spread * self.rows_per_epoch // self.spread
        return ordered(index, self.rows_per_epoch, self.seed)

    def micro_batch(self, step: int, first_row: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: (rows, T) int64."""
        length = self.sequence_length
        batch = np.empty((rows, length + 1), dtype=np.int64)
        for i, row in enumerate(self.row_index(step, first_row, rows)):
            batch[i] = self.shards.read(int(row) * length, length + 1)
        return batch[:, :-1], batch[:, 1:]


class ChatLoader:
    """Whole conversations packed in rows of T + 1 tokens; what is left of a row is padding without loss.

    mask False: loss on every token (mid). mask True: on what the assistant says (sft).
    """

    def __init__(
        self,
        folder: str | Path,
        rows_per_step: int,
        sequence_length: int,
        seed: int | None = 0,
        mask: bool = True,
        split: str = "train",
    ):
        self.conversations = Conversations.open(folder, split)
        self.rows_per_step, self.sequence_length, self.seed, self.mask = rows_per_step, sequence_length, seed, mask
        if not len(self.conversations):
            raise UserError(f"{folder}: holds no {split} conversations. Give the mixture more of them.")
        # The number of rows does not depend on the order, so one packing serves all epochs; their order differs.
        self.packed: Packed = pack(self.conversations.lengths, sequence_length + 1, seed or 0)
        self.rows_per_epoch = len(self.packed.rows)
        self.padding_fraction, self.truncated = self.packed.padding_fraction, self.packed.truncated

    def micro_batch(self, step: int, first_row: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """inputs, targets: (rows, T) int64; targets -1 where there is no loss."""
        index = step * self.rows_per_step + np.arange(first_row, first_row + rows, dtype=np.int64)
        tokens = np.full((rows, self.sequence_length + 1), self.conversations.pad_id, dtype=np.int64)
        loss = np.zeros((rows, self.sequence_length + 1), dtype=bool)
        for i, row in enumerate(ordered(index, self.rows_per_epoch, self.seed)):
            at = 0
            for conversation in self.packed.rows[row]:
                ids, mask = self.conversations.read(conversation, self.sequence_length + 1)
                tokens[i, at : at + len(ids)] = ids
                loss[i, at : at + len(ids)] = mask if self.mask else True
                at += len(ids)
        targets = np.where(loss, tokens, -1)
        return tokens[:, :-1], targets[:, 1:]


def ordered(index: np.ndarray, rows_per_epoch: int, seed: int | None) -> np.ndarray:
    """Row of the epoch for each running index (int64): a permutation of the rows for every epoch, or the plain order."""
    epochs, places = np.divmod(index, rows_per_epoch)
    if seed is None:
        return places
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = permuted(places[chosen], rows_per_epoch, seed, int(epoch))
    return rows


def permuted(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Image of `places` under a pseudo-random permutation of range(count), without a table of it.

    A Feistel network over the next power of four; what falls outside the range is sent through again (cycle walking,
    Black and Rogaway 2002). A billion rows cost no memory and no start-up.
    """
    half = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    values = places.astype(np.uint64)
    todo = np.ones(values.shape, dtype=bool)
    while todo.any():
        left, right = values[todo] >> half, values[todo] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        values[todo] = (left << half) | right
        todo = values >= count
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every input bit reaches every output bit. Overflow is meant."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
