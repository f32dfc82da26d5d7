"""Muon for the matrices of the blocks, AdamW for the token embeddings, the head and the rest; state by parameter name.

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest orthogonal matrix: every direction of the update gets
the same length. It is made of matrix products only, batched here over all matrices of a shape.

Whether an update happens at all is decided on the device: a step whose loss or gradient is not finite changes neither weights nor
state, and nobody has to wait for the device to know. With several ranks each updates its share.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat import config
from nanochat.errors import UserError
from nanochat.model.banks import Alone, Bank, Layout, Ranks, make_banks, wait_for_all
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
SMEAR_LEARNING_RATE = 0.2
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


def muon_update(
    weights: Tensor,
    momentum: Tensor,
    gradients: Tensor,
    coefficients: Tensor,
    gradient_scale: Tensor,
    ok: Tensor,
    parts: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Update weights and momentum in place, using the gradients up; nothing changes where `ok` is false, whatever they are.

    weights, momentum, gradients  (n, rows, columns) float32
    coefficients                  (3,) learning rate, learning rate x weight decay, momentum
    gradient_scale, ok            scalars, float32 and bool
    parts                         rows of the matrices that the rows consist of; each is a matrix of its own to Muon
    dtype                         of the matrix products
    """
    rate, decay, beta = (coefficients * ok).unbind()
    gradients.mul_(gradient_scale).masked_fill_(~ok, 0.0)
    momentum.lerp_(gradients, ok.float() - beta)
    update = gradients.lerp_(momentum, beta)  # Nesterov
    weights.mul_(1 - decay)
    first = 0
    # Neighbours of one size, as queries, keys and values mostly are, go in one batch.
    for rows, group in itertools.groupby(parts):
        count = len(list(group))
        stop = first + count * rows
        matrices = update[:, first:stop].reshape(-1, rows, update.size(-1))
        matrices = orthogonalize(matrices, dtype).to(weights.dtype)
        # A tall matrix' update is longer, so that the change of its outputs is that of a square one.
        tallness = max(1.0, rows / update.size(-1)) ** 0.5
        weights[:, first:stop].sub_(matrices.reshape(-1, stop - first, update.size(-1)) * (rate * tallness))
        first = stop


class Optimizer:
    """Both optimizers behind one `step`.

    It lays out the weights and gradients of the model's parameters in banks: make it after the model is on its device.
    The queries', keys' and values' parts of a fused projection are matrices of their own to Muon. State is saved under the
    names of parameters: it does not depend on the number of ranks.
    """

    def __init__(
        self,
        model: GPT,
        settings: config.Optimizer,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
        compile: bool = False,
    ):
        """
        dtype    of Muon's products; None: the model's compute dtype
        ranks    that share the update and its state; None: this process alone
        compile  Muon's update: its elementwise passes become a few kernels
        """
        self.settings, self.dtype, self.ranks = settings, dtype or model.compute_dtype, ranks or Alone()
        self.parameters = dict(model.named_parameters())
        self.muon_update = torch.compile(muon_update, dynamic=False) if compile else muon_update
        self.adam_rates = _adam_rates(model, settings)
        layouts = _layouts(model, list(self.adam_rates))
        self.banks, self.gradients = make_banks(layouts, self.parameters, self.ranks)
        self.matrices = [bank for bank in self.banks if not bank.layout.by_rows]
        self.momenta = [torch.zeros_like(bank.share(bank.weights)) for bank in self.matrices]
        self.rows = [bank for bank in self.banks if bank.layout.by_rows]
        self.adam = self._make_adam()

    def _make_adam(self) -> torch.optim.AdamW:
        """Of this rank's rows. The fused one takes the gradients' scale and a flag that there is no update from the device."""
        groups = []
        for bank in self.rows:
            share = torch.nn.Parameter(bank.share(bank.weights))
            share.grad = bank.share(bank.gradients)
            groups.append({"params": [share], "lr": self.adam_rates[bank.layout.names[0]]})
        adam = torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=0.0, fused=True)
        for group in adam.param_groups:
            share = group["params"][0]
            # From the start, so that the state has the same keys before the first update as after it.
            adam.state[share] = {
                "step": torch.zeros((), dtype=torch.float32, device=share.device),
                "exp_avg": torch.zeros_like(share),
                "exp_avg_sq": torch.zeros_like(share),
            }
        return adam

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def reduce_gradients(self) -> Tensor:
        """Sum the gradients over the ranks, each rank its share; returns the square of its share's norm, float64.

        The ranks' squares add up to that of the whole gradient; not finite when any gradient is not.
        """
        wait_for_all([self.ranks.reduce_scatter(bank.gradients) for bank in self.banks])
        if self.ranks.size == 1:
            return torch.linalg.vector_norm(self.gradients).double().square()
        norms = torch._foreach_norm([bank.share(bank.gradients) for bank in self.banks])
        return torch.stack(norms).double().square().sum()

    @torch.no_grad()
    def step(
        self,
        step: int,
        learning_rate_scale: float,
        gradient_scale: Tensor | None = None,
        ok: Tensor | None = None,
    ) -> None:
        """Update the weights from their gradients: this rank's share, then every rank has all.

        step                 counted from 0: Muon's momentum depends on it
        learning_rate_scale  the schedule's factor, of all learning rates
        gradient_scale       multiplies the gradients; a scalar on the device
        ok                   false: nothing changes, neither weights nor state; a bool scalar on the device
        """
        device = self.gradients.device
        scale = torch.ones((), device=device) if gradient_scale is None else gradient_scale.float()
        ok = torch.ones((), dtype=torch.bool, device=device) if ok is None else ok
        for group, bank in zip(self.adam.param_groups, self.rows, strict=True):
            group["lr"] = self.adam_rates[bank.layout.names[0]] * learning_rate_scale
        self.adam.grad_scale, self.adam.found_inf = 1 / scale, 1 - ok.float()
        self.adam.step()
        # These are large and Muon is matrix products: what is sent meanwhile costs next to nothing.
        pending = [self.ranks.all_gather(bank.weights) for bank in self.rows]
        rate = self.settings.matrix_learning_rate * learning_rate_scale
        momentum = momentum_at(step, self.settings.momentum)
        coefficients = torch.tensor([rate, rate * self.settings.weight_decay, momentum])
        if device.type == "cuda":
            coefficients = coefficients.pin_memory().to(device, non_blocking=True)
        for bank, state in zip(self.matrices, self.momenta, strict=True):
            if bank.owned:
                own = [bank.share(bank.weights)[: bank.owned], state[: bank.owned]]
                own.append(bank.share(bank.gradients)[: bank.owned])
                self.muon_update(*own, coefficients, scale, ok, bank.layout.parts, self.dtype)
            pending.append(self.ranks.all_gather(bank.weights))
        wait_for_all(pending)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor: `<parameter>.momentum`, or `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`. For all ranks at once.

        With several ranks the gradients' memory, free between steps, is where the shares come together: a tensor is good
        until the next one is asked for, and the gradients are gone.
        """
        for bank, share in zip(self.matrices, self.momenta, strict=True):
            for name, tensor in bank.by_name(self._whole(bank, share)):
                yield f"{name}.momentum", tensor
        for bank, adam in self._adam_states():
            name = bank.layout.names[0]
            yield f"{name}.step", adam["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{name}.{key}", next(bank.by_name(self._whole(bank, adam[key])))[1]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of `state`, on its device."""
        return {name: tensor.clone() for name, tensor in self.state()}

    def state_like(self) -> dict[str, Tensor]:
        """A tensor of the same shape and dtype for each of `state`; its content is something else."""
        like = {f"{name}.momentum": self.parameters[name] for bank in self.matrices for name in bank.layout.names}
        for bank, adam in self._adam_states():
            name = bank.layout.names[0]
            like |= {f"{name}.step": adam["step"]}
            like |= {f"{name}.{key}": self.parameters[name] for key in ("exp_avg", "exp_avg_sq")}
        return like

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, on however many ranks. Raises UserError when it is of another model."""
        like = self.state_like()
        differing = sorted(state.keys() ^ like.keys())
        differing += [name for name in like if name in state and state[name].shape != like[name].shape]
        if differing:
            raise UserError(f"optimizer state: {differing[0]}: it is that of another model.")
        for bank, share in zip(self.matrices, self.momenta, strict=True):
            bank.take_share({name: state[f"{name}.momentum"] for name in bank.layout.names}, share)
        for bank, adam in self._adam_states():
            name = bank.layout.names[0]
            adam["step"].copy_(state[f"{name}.step"])
            for key in ("exp_avg", "exp_avg_sq"):
                bank.take_share({name: state[f"{name}.{key}"]}, adam[key])

    def _adam_states(self) -> Iterator[tuple[Bank, dict[str, Tensor]]]:
        for bank, group in zip(self.rows, self.adam.param_groups, strict=True):
            yield bank, self.adam.state[group["params"][0]]

    def _whole(self, bank: Bank, share: Tensor) -> Tensor:
        """(slots, *item) from the shares of all ranks."""
        if self.ranks.size == 1:
            return share
        bank.share(bank.gradients).copy_(share)
        wait_for_all([self.ranks.all_gather(bank.gradients)])
        return bank.gradients


def _adam_rates(model: GPT, settings: config.Optimizer) -> dict[str, float]:
    """Learning rates of the parameters that Muon is not for.

    They are given for a width of 768, and fall with the square root of the width.
    """
    scale, rates = (768 / model.config.width) ** 0.5, {}
    for name, _ in model.named_parameters():
        if name == "embedding":
            rates[name] = settings.embedding_learning_rate * scale
        elif name == "head":
            rates[name] = settings.unembedding_learning_rate * scale
        elif name.endswith("value_embedding.embedding"):
            rates[name] = settings.embedding_learning_rate / 2 * scale
        elif name.startswith("smear."):
            rates[name] = SMEAR_LEARNING_RATE
    return rates


def _layouts(model: GPT, adam_names: list[str]) -> list[Layout]:
    """Adam's parameters by rows; the blocks' matrices by shape, the largest first, so that the last to be sent is small."""
    by_shape: dict[tuple, list[str]] = {}
    for name, parameter in model.named_parameters():
        if name in adam_names:
            continue
        is_matrix = name.startswith("blocks.") and parameter.dim() == 2
        assert is_matrix, f"{name}: no optimizer is given for it"
        parts = (parameter.size(0),)
        if name.endswith("attention.qkv.weight"):
            head_dim = model.config.width // model.config.heads
            parts = tuple(heads * head_dim for heads in (model.config.heads, *[model.config.kv_heads] * 2))
        by_shape.setdefault((tuple(parameter.shape), parts), []).append(name)
    parameters = dict(model.named_parameters())
    layouts = [Layout((name,), tuple(parameters[name].shape), by_rows=True) for name in adam_names]
    matrices = [Layout(tuple(names), shape, parts=parts) for (shape, parts), names in by_shape.items()]
    return layouts + sorted(matrices, key=lambda layout: -torch.Size(layout.shape).numel())
