"""Bits per byte of held-out text: the loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from nanochat.data.token_shards import TokenShards
from nanochat.errors import UserError
from nanochat.infer.scoring import PASS_TOKENS
from nanochat.model.gpt import GPT
from nanochat.progress import Progress


@torch.no_grad()
def bits_per_byte(model: GPT, shards: TokenShards, token_bytes: np.ndarray, most_tokens: int) -> tuple[float, int]:
    """Score and number of tokens that were predicted.

    Rows of the model's training length, end to end; each token but the very first is predicted once, from what stands before
    it in its row. Of a split with more than `most_tokens`, whole rows spread evenly over it: a corpus of several sources has them one
    after the other. Special tokens stand for no text: neither their bits nor their 0 bytes count.

    token_bytes  (V,) int64, bytes of text of each token
    """
    total = shards.total_tokens
    if total < 2:
        raise UserError(f"{shards.folder}: {shards.total_tokens} held-out tokens are too few to score. Give more text.")
    bytes_of = torch.from_numpy(token_bytes).to(model.device)
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    counted = torch.zeros((), dtype=torch.int64, device=model.device)
    progress = Progress("evaluate bits_per_byte", min(total - 1, most_tokens), "token")
    done = 0
    for rows in _rows(shards, most_tokens, model.config.sequence_length, PASS_TOKENS[model.device.type]):
        tokens = torch.from_numpy(rows).to(model.device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        losses = model(inputs, targets, reduction="none")  # (B, T) nats
        size = bytes_of[targets]
        nats += torch.where(size > 0, losses, 0.0).double().sum()
        counted += size.sum()
        done += targets.numel()
        progress.update(done)
    if int(counted) == 0:
        raise UserError(f"{shards.folder}: the held-out tokens stand for no text at all. Run the target `tokens`.")
    return float(nats) / math.log(2) / int(counted), done


def _rows(shards: TokenShards, most_tokens: int, length: int, pass_tokens: int) -> Iterator[np.ndarray]:
    """(B, T + 1) int64: neighbouring rows share a token, which is the last target of one and the first input of the next."""
    targets = shards.total_tokens - 1
    whole, batch = targets // length, max(1, pass_tokens // length)
    wanted = whole if targets <= most_tokens else min(whole, max(1, most_tokens // length))
    for first in range(0, wanted, batch):
        places = [row * whole // wanted for row in range(first, min(first + batch, wanted))]
        yield np.stack([shards.read(row * length, length + 1).astype(np.int64) for row in places])
    if targets <= most_tokens and (rest := targets % length):
        yield shards.read(whole * length, rest + 1).astype(np.int64)[None]
    elif not whole:
        yield shards.read(0, most_tokens + 1).astype(np.int64)[None]
