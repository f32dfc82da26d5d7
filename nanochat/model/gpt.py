"""The transformer: nanochat's family.

Rotary embeddings instead of learnt positions, RMS norms without gains (also of queries, keys and the embedding), relu^2 in the
MLP, an output head that is not tied to the embedding, no biases, softcapped logits, grouped-query attention as an option.

Weights are float32; activations and matrix products are in `model.compute_dtype`.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.config import ROTARY_REACH, Model, window_of
from nanochat.errors import UserError
from nanochat.model.additions import Smear, before
from nanochat.model.attention import Attention, KVCache, rotary_table
from nanochat.model.kernels import HAS_TRITON, fused, lookup, norm, squared_relu
from nanochat.model.linear import Linear
from nanochat.model.loss import softcapped_logits, summed_loss, token_losses

if HAS_TRITON:
    from nanochat.model.fused_mlp import FusedMLP


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model; all that is needed to build it."""

    vocab_size: int
    depth: int
    width: int
    heads: int
    kv_heads: int
    logit_softcap: float
    rope_base: float
    sequence_length: int
    additions: tuple[str, ...] = ()
    window: int = 0  # tokens; 0: what follows from sequence_length, if the additions name windows

    def __post_init__(self) -> None:
        object.__setattr__(self, "additions", tuple(self.additions))  # from a JSON list
        if "windows" in self.additions and not self.window:
            object.__setattr__(self, "window", window_of(self.sequence_length))
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(
                f"model.width = {self.width}: not divisible into heads = {self.heads} of an even size. "
                f"With head_dim 64 it would be {max(1, self.width // 64)} heads of a width of {max(1, self.width // 64) * 64}."
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads = {self.kv_heads}: must divide heads = {self.heads}, "
                f"one of {[n for n in range(1, self.heads + 1) if self.heads % n == 0]}."
            )

    @classmethod
    def from_settings(cls, settings: Model, vocab_size: int, sequence_length: int) -> "GPTConfig":
        resolved = settings.resolved(sequence_length)
        return cls(
            vocab_size=vocab_size,
            depth=resolved.depth,
            width=resolved.width,
            heads=resolved.heads,
            kv_heads=resolved.kv_heads,
            logit_softcap=resolved.logit_softcap,
            rope_base=resolved.rope_base,
            sequence_length=sequence_length,
            additions=tuple(resolved.additions),
            window=resolved.window or 0,
        )

    def with_sequence_length(self, sequence_length: int) -> "GPTConfig":
        """For a training on rows of that length; the window stays the one that the weights have learnt with."""
        return dataclasses.replace(self, sequence_length=sequence_length)


class MLP(nn.Module):
    """Width x 4, relu^2 between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        # Without gradients the compiler fuses as much, and inference stays on one path for any number of rows.
        if torch.is_grad_enabled() and fused("mlp", x):
            return FusedMLP.apply(x, self.up.weight.to(x.dtype), self.down.weight.to(x.dtype))
        return self.down(squared_relu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        """x (B, T, C) -> (B, T, C); the other arguments are those of `Attention.forward`."""
        x, change = self.deferred(x, *attention_arguments)
        return x + change

    def deferred(self, x: Tensor, *attention_arguments) -> tuple[Tensor, Tensor]:
        """The stream after attention, and what the MLP adds to it."""
        x = x + self.attention(norm(x), *attention_arguments)
        return x, self.mlp(norm(x))


class GPT(nn.Module):
    """Weights come from `init_weights` or from a file; a new module holds undefined numbers."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.windows = tuple({block.attention.window for block in self.blocks})
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.smear = Smear(config.width) if "smear" in config.additions else None
        # Not in the state: it follows from the sizes.
        cos, sin = rotary_table(ROTARY_REACH * config.sequence_length, config.width // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.head.device

    def matmul_parameters(self) -> int:
        """Parameters that take part in matrix products: all but the token embeddings. The N of 6 N FLOPs a token."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.endswith("embedding"))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """nanochat's start: each block adds nothing at first, the head is nearly silent.

        generator  a CPU generator: drawn on the CPU the weights are the same on every device
        """
        bound = (3 / self.config.width) ** 0.5  # uniform of the standard deviation 1 / sqrt(fan_in)
        for name, parameter in self.named_parameters():
            draw = torch.empty(parameter.shape, dtype=torch.float32)
            if name == "embedding":
                draw.normal_(0.0, 1.0, generator=generator)
            elif name == "head":
                draw.normal_(0.0, 0.001, generator=generator)
            elif name.endswith(("attention.out.weight", "mlp.down.weight")):
                draw.zero_()
            elif name.endswith("value_embedding.gate.weight"):
                draw.uniform_(0, 0.02, generator=generator)
            elif name.startswith("smear."):
                draw.zero_()
            else:
                draw.uniform_(-bound, bound, generator=generator)
            parameter.copy_(draw)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
        last_only: bool = False,
    ) -> Tensor:
        """Loss, or logits when there are no targets.

        tokens     (B, T) int64
        targets    (B, T) int64, -1 carries no loss
        positions  (B, T) int64, where the tokens stand in their rows; needed with a cache, otherwise 0..T-1
        cache      keys and values before these tokens; theirs are stored in place
        reduction  mean over the targets, sum (both float32 scalars) or none (B, T), 0 where there is no target; in nats.
                   none keeps no graph that saves memory: it is for evaluation
        last_only  logits of the last position alone
        returns    the loss, or the logits (B, T, V) float32, T = 1 with last_only
        """
        x = self.hidden(tokens, positions, cache)
        if targets is None:
            return softcapped_logits(x[:, -1:] if last_only else x, self.head, self.config.logit_softcap)
        return self.loss(x, targets, reduction)

    def loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The loss of the stream `x` that `hidden` gave; `targets` and `reduction` as of `forward`."""
        flat, flat_targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        if reduction == "none":
            return token_losses(flat, self.head, flat_targets, self.config.logit_softcap).view(targets.shape)
        total = summed_loss(flat, self.head, flat_targets, self.config.logit_softcap)
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp_min(1)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The normed stream before the head: (B, T) int64 -> (B, T, C) in compute_dtype."""
        if positions is None:
            assert cache is None, "with a cache the positions must be given"
        cos, sin = self.angles(tokens.size(1) if cache is None else cache.length, positions)
        masks = {window: None if cache is None else cache.mask(positions, window) for window in self.windows}
        x = self.embedded(tokens, positions, cache)
        for block in self.blocks:
            x = block(x, tokens, cos, sin, cache, positions, masks[block.attention.window])
        return norm(x)

    def angles(self, length: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, T, 1, D/2) at `positions` (B, T), or (1, length, 1, D/2) at 0..length-1, in compute_dtype."""
        if length > self.cos.size(0):
            raise ValueError(f"{length} positions; this model's rotary table reaches {self.cos.size(0)}")
        at = slice(length) if positions is None else positions
        cos, sin = self.cos[at][..., None, :], self.sin[at][..., None, :]
        if positions is None:
            cos, sin = cos[None], sin[None]
        return cos.to(self.compute_dtype), sin.to(self.compute_dtype)

    def embedded(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, C), the stream before the first block; with a cache, `positions` (B, T)."""
        x = self._normed(tokens)
        if self.smear is None:
            return x
        if cache is None:
            return self.smear(x, before(x))
        there = (positions > 0)[..., None]
        return self.smear(x, self._normed(cache.tokens_before(positions, tokens)) * there)

    def _normed(self, tokens: Tensor) -> Tensor:
        return norm(lookup(self.embedding, tokens).to(self.compute_dtype))
