"""What a model has beside the plain transformer where `model.additions` names it.

value_embeddings  every second layer, the last among them, has a token embedding of its own, which a gate adds to its values
                  (Zhou et al. 2024)
smear             a learnt share of the token before is added to each embedded token
windows           three layers of four, never the last one, attend to the last `model.window` tokens alone, their own among them
                  (Beltagy et al. 2020; short and long layers in turn as in Brown et al. 2020)

Constants and starts are those of nanochat (2026), but that the smear's gate starts at zero here. Its residual scalars and backout
are not here: they did not lower the loss (docs/performance.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.model.kernels import lookup
from nanochat.model.linear import Linear

# The gates see the first channels alone: that is enough, and next to nothing to compute.
VALUE_GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24
WINDOW_PATTERN = 4  # layers, of which the last sees everything


def has_value_embedding(layer: int, depth: int) -> bool:
    return layer % 2 == (depth - 1) % 2


def has_window(layer: int, depth: int) -> bool:
    return layer != depth - 1 and layer % WINDOW_PATTERN != WINDOW_PATTERN - 1


class ValueEmbedding(nn.Module):
    """A layer's own token embedding (V, heads x D), and how much of it each head of values takes."""

    def __init__(self, vocab_size: int, width: int, heads: int, head_dim: int):
        """width: of the stream, C."""
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, heads * head_dim))
        self.gate = Linear(min(VALUE_GATE_CHANNELS, width), heads)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """What is added to the values: x (B, T, C), tokens (B, T) int64 -> (B, T, heads, D). The gates lie between 0 and 3."""
        gate = 3 * self.gate(x[..., : self.gate.in_features]).sigmoid()
        return gate[..., None] * lookup(self.embedding, tokens).to(x.dtype).view(*gate.shape, -1)


class Smear(nn.Module):
    """How much of the token before each token takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = Linear(min(SMEAR_GATE_CHANNELS, width), 1)
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x, and the embedded tokens before it, zeros before the first; (B, T, C) all."""
        share = self.scale.to(x.dtype) * self.gate(x[..., : self.gate.in_features]).sigmoid()
        return x + share * before


def before(x: Tensor) -> Tensor:
    """(B, T, C) moved on by one token, zeros first."""
    return F.pad(x[:, :-1], (0, 0, 1, 0))
