"""Muon for the matrices of the blocks, AdamW for the token embedding and the head; state by parameter name.

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest orthogonal matrix: every direction of the update gets
the same length. It is made of matrix products only, batched here over all matrices of a shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat import config
from nanochat.errors import UserError
from nanochat.model.gpt import GPT

# Polar Express (Amsel et al. 2025), five steps: the polynomial of each step is the best for the interval that the one
# before leaves the singular values in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ADAM_BETAS = (0.8, 0.95)
ADAM_EPSILON = 1e-10
FIRST_MOMENTUM, MOMENTUM_WARMUP_STEPS = 0.85, 300


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The orthogonal factor of the polar decomposition, roughly: singular values end up between 0.7 and 1.2.

    matrices  (n, rows, columns), each on its own
    dtype     of the products; bfloat16 is accurate enough
    """
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32) * 1.02 + 1e-6).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def momentum_at(step: int, momentum: float) -> float:
    """Muon's momentum rises from 0.85 over the first steps: early gradients are soon out of date."""
    first = min(FIRST_MOMENTUM, momentum)
    return first + (momentum - first) * min(1.0, step / MOMENTUM_WARMUP_STEPS)


@dataclass
class _Bank:
    """All matrices of one shape: the momentum is one tensor, so an update is a few large products."""

    slices: list[tuple[str, int, int]]  # parameter's name, first row, rows
    momentum: Tensor  # (n, rows, columns) float32


class Optimizer:
    """Both optimizers behind one `step`.

    The queries', keys' and values' parts of a fused projection are matrices of their own to Muon. State is kept and saved
    under the names of parameters: it does not depend on the number of ranks.
    """

    def __init__(self, model: GPT, settings: config.Optimizer, dtype: torch.dtype | None = None):
        """dtype  of Muon's products; None: the model's compute dtype"""
        self.settings, self.dtype = settings, dtype or model.compute_dtype
        self.parameters = dict(model.named_parameters())
        self.banks = list(_banks(model))
        # Learning rates are given for a width of 768; of Adam's they fall with the square root of the width.
        scale = (768 / model.config.width) ** 0.5
        self.adam_rates = {
            "embedding": settings.embedding_learning_rate * scale,
            "head": settings.unembedding_learning_rate * scale,
        }
        self.adam = torch.optim.AdamW(
            [{"params": [self.parameters[name]], "lr": rate} for name, rate in self.adam_rates.items()],
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=0.0,
            fused=True,
        )
        for name in self.adam_rates:
            # From the start, so that the state has the same keys before the first update as after it.
            parameter = self.parameters[name]
            self.adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, step: int, learning_rate_scale: float) -> None:
        """Update the weights from their gradients.

        step                 counted from 0: Muon's momentum depends on it
        learning_rate_scale  the schedule's factor, of all learning rates
        """
        for group, rate in zip(self.adam.param_groups, self.adam_rates.values(), strict=True):
            group["lr"] = rate * learning_rate_scale
        self.adam.step()
        momentum = momentum_at(step, self.settings.momentum)
        rate = self.settings.matrix_learning_rate * learning_rate_scale
        for bank in self.banks:
            gradients = torch.stack([self.parameters[n].grad[first : first + rows] for n, first, rows in bank.slices])
            bank.momentum.lerp_(gradients, 1 - momentum)
            update = orthogonalize(gradients.lerp_(bank.momentum, momentum), self.dtype)  # Nesterov
            # A tall matrix' update is longer, so that the change of its outputs is that of a square one.
            tallness = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            weights = [self.parameters[n][first : first + rows] for n, first, rows in bank.slices]
            if self.settings.weight_decay:
                torch._foreach_mul_(weights, 1 - rate * self.settings.weight_decay)
            torch._foreach_add_(weights, list(update.to(weights[0].dtype).unbind(0)), alpha=-rate * tallness)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: `<parameter>.momentum`, `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`."""
        state = {}
        for name in self.parameters:
            if parts := self._momentum_of(name):
                state[f"{name}.momentum"] = torch.cat(parts)
        for name in self.adam_rates:
            for key, value in self.adam.state[self.parameters[name]].items():
                state[f"{name}.{key}"] = value
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises UserError when it is of another model."""
        expected = {f"{name}.momentum" for name in self.parameters if self._momentum_of(name)}
        expected |= {f"{name}.{key}" for name in self.adam_rates for key in ("exp_avg", "exp_avg_sq", "step")}
        if state.keys() ^ expected:
            differing = sorted(state.keys() ^ expected)
            raise UserError(f"optimizer state: {differing[0]}: it is that of another model.")
        for name in self.parameters:
            first = 0
            for part in self._momentum_of(name):
                part.copy_(state[f"{name}.momentum"][first : first + part.size(0)])
                first += part.size(0)
        for name in self.adam_rates:
            for key, tensor in self.adam.state[self.parameters[name]].items():
                tensor.copy_(state[f"{name}.{key}"])

    def _momentum_of(self, name: str) -> list[Tensor]:
        """The parts of a parameter's momentum, from its first row to its last; views."""
        parts = [
            (first, bank.momentum[i])
            for bank in self.banks
            for i, (owner, first, _) in enumerate(bank.slices)
            if owner == name
        ]
        return [part for _, part in sorted(parts, key=lambda pair: pair[0])]


def _banks(model: GPT) -> Iterator[_Bank]:
    by_shape: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
    head_dim = model.config.width // model.config.heads
    for name, parameter in model.named_parameters():
        if not name.startswith("blocks."):
            continue
        if name.endswith("attention.qkv.weight"):
            sizes = [model.config.heads * head_dim, model.config.kv_heads * head_dim, model.config.kv_heads * head_dim]
        else:
            sizes = [parameter.size(0)]
        first = 0
        for rows in sizes:
            by_shape.setdefault((rows, parameter.size(1)), []).append((name, first, rows))
            first += rows
    for (rows, columns), slices in by_shape.items():
        yield _Bank(slices, torch.zeros(len(slices), rows, columns, dtype=torch.float32, device=model.device))
