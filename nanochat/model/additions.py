"""What newer models of the family add to the plain one for quality, each optional: `model.additions`.

value_embeddings  every second layer, the last among them, has a second token embedding, which a gate adds to its values
                  (Zhou et al. 2024)
scalars           before each block the stream and the embedded tokens are mixed, with two learnt numbers a layer
smear             a learnt share of the token before is added to each embedded token
backout           a learnt share of the stream at mid-depth is subtracted from it at the end

Constants and starts are those of nanochat (2026), which took most of it from modded-nanogpt.
"""

import torch
from torch import Tensor, nn

from nanochat.model.linear import Linear

VALUE_GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24


def has_value_embedding(layer: int, depth: int) -> bool:
    return layer % 2 == (depth - 1) % 2


class ValueEmbedding(nn.Module):
    """A layer's second token embedding."""

    def __init__(self, vocab_size: int, width: int, heads: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        self.gate = Linear(VALUE_GATE_CHANNELS, heads)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, T, C), tokens (B, T) int64 -> (B, T, heads, width / heads), to be added to the values."""
        gate = 3 * self.gate(x[..., :VALUE_GATE_CHANNELS]).sigmoid()
        values = nn.functional.embedding(tokens, self.embedding).to(x.dtype)
        return gate[..., None] * values.view(*gate.shape, -1)


class Scalars(nn.Module):
    """Two numbers for each layer."""

    def __init__(self, depth: int):
        super().__init__()
        self.stream = nn.Parameter(torch.empty(depth))
        self.start = nn.Parameter(torch.empty(depth))

    @torch.no_grad()
    def init_weights(self) -> None:
        depth = len(self.stream)
        self.stream.copy_(torch.linspace(1.15, 1.05, depth))
        self.start.copy_(torch.linspace(0.2, 0.05, depth))


class Smear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Linear(SMEAR_GATE_CHANNELS, 1)
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x, and the embedded tokens before it; (B, T, C) both. Zeros stand before the first one."""
        share = self.scale.to(x.dtype) * self.gate(x[..., :SMEAR_GATE_CHANNELS]).sigmoid()
        return x + share * before
