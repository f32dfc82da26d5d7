"""Causal self-attention with rotary embeddings, normed queries and keys, grouped queries, and the cache for decoding.

With a cache a step is a pure function of tensors: shapes are static, nothing waits for the device, so that a whole decode
step can be captured in a CUDA graph.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nanochat.model.additions import ValueEmbedding, has_value_embedding, has_window
from nanochat.model.kernels import HAS_TRITON, causal_attention, fused, norm, seen
from nanochat.model.linear import Linear

if HAS_TRITON:
    from nanochat.model.fused_projection import Projection

if TYPE_CHECKING:
    from nanochat.model.gpt import GPTConfig


def rotary_table(length: int, head_dim: int, base: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim / 2) float32 of the angles position x base^(-2i / head_dim) (Su et al. 2021)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by the angles of their position.

    x         (B, T, H, D)
    cos, sin  (1 or B, T, 1, D/2), of x's dtype
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens seen so far, one tensor per layer and side.

    keys[l], values[l]  (rows, length, kv_heads, head_dim), in memory a head's positions next to each other: what reads one head of
                        a row reads one piece
    tokens              (rows, length) int64, what they are of; of a model with smear, None of others

    One tensor each, because a compiled step that writes into a view of one big tensor copies all of it at every layer.
    What stands behind a row's position is never read, so a row is reused without clearing.
    """

    def __init__(self, config: "GPTConfig", rows: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (rows, config.kv_heads, length, config.width // config.heads)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(config.depth)]
            for _ in range(2)
        )
        smeared = "smear" in config.additions
        self.tokens = torch.zeros((rows, length), device=device, dtype=torch.int64) if smeared else None

    def tensors(self) -> list[Tensor]:
        """All of them: (rows, length, ...)."""
        return [*self.keys, *self.values, *([] if self.tokens is None else [self.tokens])]

    @property
    def rows(self) -> int:
        return self.keys[0].size(0)

    @property
    def length(self) -> int:
        return self.keys[0].size(1)

    def sliced(self, first_row: int = 0, rows: int | None = None, length: int | None = None) -> "KVCache":
        """A cache over some rows and the first `length` positions; it shares the memory, so what it stores is stored here."""
        rows, length = self.rows - first_row if rows is None else rows, self.length if length is None else length
        view = KVCache.__new__(KVCache)
        view.keys = [side[first_row : first_row + rows, :length] for side in self.keys]
        view.values = [side[first_row : first_row + rows, :length] for side in self.values]
        view.tokens = None if self.tokens is None else self.tokens[first_row : first_row + rows, :length]
        return view

    def copy_rows(self, source: "KVCache", pairs: list[tuple[int, int]], length: int) -> None:
        """Take over the first `length` positions of rows of `source`, which may be this cache: pairs of (row here, row there).

        No row is both taken and overwritten.
        """
        here, there = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
        for target, side in zip(self.tensors(), source.tensors(), strict=True):
            target[:, :length].index_copy_(0, here, side[:, :length].index_select(0, there))

    def store(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values (B, T, kv_heads, head_dim) at `positions` (B, T) in place; returns the layer's whole tensors."""
        row = torch.arange(positions.size(0), device=positions.device)[:, None]
        self.keys[layer].index_put_((row, positions), keys)
        self.values[layer].index_put_((row, positions), values)
        return self.keys[layer], self.values[layer]

    def tokens_before(self, positions: Tensor, tokens: Tensor) -> Tensor:
        """Store tokens (B, T) at `positions` (B, T); returns what stands before each of them, anything before the first."""
        row = torch.arange(positions.size(0), device=positions.device)[:, None]
        self.tokens.index_put_((row, positions), tokens)
        return self.tokens[row, (positions - 1).clamp_min(0)]

    def mask(self, positions: Tensor, window: int | None = None) -> Tensor:
        """(B, 1, T, length) bool: a query at position p attends to the keys 0..p of its row, to the last `window` of them."""
        return seen(positions[..., None], torch.arange(self.length, device=positions.device), window)[:, None]


class Attention(nn.Module):
    """Queries, keys and values in one projection: at small widths the number of kernels is the limit, not their bytes."""

    def __init__(self, config: "GPTConfig", layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.heads, config.kv_heads
        self.head_dim = config.width // config.heads
        self.qkv = Linear(config.width, (config.heads + 2 * config.kv_heads) * self.head_dim)
        self.out = Linear(config.width, config.width)
        # How many keys a query sees; None: all up to its own.
        self.window = config.window if config.window and has_window(layer, config.depth) else None
        self.value_embedding = None
        if "value_embeddings" in config.additions and has_value_embedding(layer, config.depth):
            self.value_embedding = ValueEmbedding(config.vocab_size, config.width, self.kv_heads, self.head_dim)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | None = None,
    ) -> Tensor:
        """x (B, T, C), tokens (B, T) -> (B, T, C).

        Without a cache: causal over the T tokens; `mask` is `window_blocks` of the layer's window, if at all.
        With: `positions` (B, T), `mask` (B, 1, T, length), which holds the window.
        """
        rows, length, width = x.shape
        if cache is None and fused("projection", x):
            weight = self.qkv.weight.to(x.dtype)
            queries, keys, values = Projection.apply(x, weight, cos, sin, self.heads, self.kv_heads)
        else:
            qkv = self.qkv(x).view(rows, length, self.heads + 2 * self.kv_heads, self.head_dim)
            # Queries and keys are turned and normed alike, so they go through it as one tensor.
            turned = norm(rotate(qkv[:, :, : self.heads + self.kv_heads], cos, sin))
            queries, keys = turned.split((self.heads, self.kv_heads), dim=2)
            values = qkv[:, :, self.heads + self.kv_heads :]
        if self.value_embedding is not None:
            values = values + self.value_embedding(x, tokens)
        if cache is None:
            sides = (queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
            attended = causal_attention(*sides, self.window, mask)
        else:
            keys, values = cache.store(self.layer, positions, keys, values)
            attended = F.scaled_dot_product_attention(
                queries.transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=mask,
                enable_gqa=self.kv_heads != self.heads,
            )
        return self.out(attended.transpose(1, 2).reshape(rows, length, width))
