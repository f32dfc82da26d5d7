"""Sampling: logits in, token ids out, no host sync.

A draw is `argmax(logits / temperature + noise)` with Gumbel noise, which needs no cumulative sum and no normaliser: the only
thing that couples one token to another is the maximum. The noise is a hash of (the row's seed, the index of the draw, the
token id), so that a row reproduces whatever rows stand beside it, on any device, inside a CUDA graph as well.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.infer.capacity import DRAWN_ROWS

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive integers over 32 bits


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled. The defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020); 1: all tokens
    min_p: float = 0.0  # tokens at least this fraction as probable as the best one; 0: all tokens
    seed: int = 0

    def problem(self) -> str | None:
        """What is wrong with the values, or None."""
        if not self.temperature >= 0:
            return f"temperature = {self.temperature}: must be 0 (greedy) or more"
        if self.top_k < 0:
            return f"top_k = {self.top_k}: must be 0 (all tokens) or more"
        if not 0 < self.top_p <= 1:
            return f"top_p = {self.top_p}: must be above 0 and at most 1 (all tokens)"
        if not 0 <= self.min_p <= 1:
            return f"min_p = {self.min_p}: must be 0 (all tokens) to 1"
        return None


class Kind(NamedTuple):
    """What a step of some rows has to do; what none of them asks for is left out. The defaults leave nothing out."""

    greedy: bool = False  # all temperatures are 0: only an argmax
    cut: bool = True  # some row leaves tokens out: the logits of all tokens are needed before one is drawn
    filtered: bool = True  # some row has top_k or top_p: a sort of the vocabulary

    @classmethod
    def of(cls, rows: list[Sampling]) -> "Kind":
        drawing = [row for row in rows if row.temperature > 0]
        filtered = any(row.top_k > 0 or row.top_p < 1 for row in drawing)
        return cls(not drawing, filtered or any(row.min_p > 0 for row in drawing), filtered)


@dataclass
class RowSampling:
    """The settings of R rows as tensors on the device, so that a captured step reads whatever they are now."""

    temperature: Tensor  # (R,) float32
    top_k: Tensor  # (R,) int64
    top_p: Tensor  # (R,) float32
    min_p: Tensor  # (R,) float32
    seed: Tensor  # (R,) int64, 32 bits used

    @classmethod
    def of(cls, rows: list[Sampling], device: torch.device | str) -> "RowSampling":
        """One row for each of the settings."""
        return cls(
            torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row.top_k for row in rows], dtype=torch.int64, device=device),
            torch.tensor([row.top_p for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row.min_p for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row.seed & 0xFFFFFFFF for row in rows], dtype=torch.int64, device=device),
        )

    def __getitem__(self, rows: slice) -> "RowSampling":
        """Those rows, as views."""
        return RowSampling(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, slots: Tensor, other: "RowSampling") -> None:
        """Overwrite the rows `slots` (n,) with the n rows of `other`, in place."""
        for field in fields(self):
            getattr(self, field.name).index_copy_(0, slots, getattr(other, field.name))


def sample(logits: Tensor, rows: RowSampling, draws: Tensor, kind: Kind = Kind()) -> Tensor:  # noqa: B008, a constant
    """Draw one token per row.

    logits   (R, V) float32
    rows     the settings of the R rows
    draws    (R,) int64, how many tokens the row has drawn before: with its seed, what its noise depends on
    kind     what the caller knows of the rows
    returns  (R,) int64
    """
    if kind.greedy:
        return logits.argmax(-1)
    # Noise and sort take several times the memory of their logits.
    pieces = [slice(first, first + DRAWN_ROWS) for first in range(0, len(logits), DRAWN_ROWS)]
    drawn = [_drawn(logits[piece], rows[piece], draws[piece], kind) for piece in pieces]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def _drawn(logits: Tensor, rows: RowSampling, draws: Tensor, kind: Kind) -> Tensor:
    greedy = logits.argmax(-1)
    scaled = logits / rows.temperature.clamp_min(1e-6)[:, None]
    # min_p: p >= min_p x p_max is a distance between logits.
    floor = scaled.amax(-1) + rows.min_p.log()  # (R,), -inf when off
    kept = scaled >= floor[:, None]
    if kind.filtered:
        kept &= _nucleus(scaled, rows.top_k, rows.top_p)
    noise = gumbel(rows.seed, draws, logits.size(-1))
    drawn = scaled.add_(noise).masked_fill_(~kept, -torch.inf).argmax(-1)
    return torch.where(rows.temperature > 0, drawn, greedy)


def gumbel(seeds: Tensor, draws: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise from a counter, (R, V) float32.

    murmur3's 32-bit finaliser over a key of the row (seed and draw) combined with a key of the token; 24 bits of it are the
    uniform number.
    """
    row = _mix(_mix(seeds & 0xFFFFFFFF) + draws * GOLDEN & 0xFFFFFFFF)  # (R,)
    token = _mix(torch.arange(1, vocab_size + 1, device=seeds.device) * GOLDEN & 0xFFFFFFFF)  # (V,)
    bits = _mix(row[:, None] ^ token) >> 8  # (R, V), 24 bits
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-24  # never 0 and, rounded, never above 1 - 2^-24
    return uniform.clamp_(max=1 - 2.0**-24).log_().neg_().log_().neg_()


def _mix(bits: Tensor) -> Tensor:
    """murmur3's finaliser on 32-bit values held in int64, in place; a product of two 32-bit values wraps and its low 32 bits stay right."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> shift
        bits *= factor
        bits &= 0xFFFFFFFF
    bits ^= bits >> 16
    return bits


def _nucleus(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens are among the row's top k, and in the smallest set of those that holds the probability top_p. (R, V) bool."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.size(-1), device=scaled.device)
    limit = torch.where(top_k > 0, top_k, scaled.size(-1))
    inside = rank < limit[:, None]  # (R, V)
    probabilities = torch.softmax(ordered.masked_fill_(~inside, -torch.inf), dim=-1)
    before = probabilities.cumsum(-1).sub_(probabilities)  # of the better tokens together
    # Off means off: a rounded cumulative sum can reach 1 early and must not cut the tail.
    inside &= (before < top_p[:, None]) | (top_p[:, None] >= 1)
    inside[:, 0] = True
    return torch.zeros_like(inside).scatter_(-1, order, inside)
