"""Parameters of one shape side by side in memory, shared out over the ranks.

A bank's weights are one tensor and its gradients another; the parameters and their `.grad` become views into them. So an update is
a few large operations without gathering anything first, and the gradients are summed, and the weights sent round, in one
piece a bank. Each rank updates its share of a bank's items and keeps the optimizer state of that share alone (ZeRO-2,
Rajbhandari et al. 2020).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Pending(Protocol):
    """A transfer under way."""

    def wait(self) -> object: ...


class Ranks(Protocol):
    """The processes that share the work. Tensors are shared out along their first dimension, which `size` divides."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def reduce_scatter(self, tensor: Tensor) -> Pending | None:
        """Replace this rank's share by the sum over the ranks; the rest is undefined afterwards."""
        ...

    def all_gather(self, tensor: Tensor) -> Pending | None:
        """Replace each rank's share by what that rank has in it."""
        ...


class Alone:
    """One process: nothing to send."""

    rank, size = 0, 1

    def reduce_scatter(self, tensor: Tensor) -> None:
        return None

    def all_gather(self, tensor: Tensor) -> None:
        return None


def wait_for_all(pending: Iterable[Pending | None]) -> None:
    for one in pending:
        if one is not None:
            one.wait()


@dataclass(frozen=True)
class Layout:
    """Which parameters form a bank. Its items are whole parameters, or with `by_rows` the rows of its one parameter.

    parts  rows of the matrices that a parameter consists of, from the top: a fused projection is several
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    by_rows: bool = False
    parts: tuple[int, ...] = ()

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.by_rows else self.shape

    @property
    def items(self) -> int:
        return self.shape[0] if self.by_rows else len(self.names)


class Bank:
    """Weights and gradients of a layout, each (slots, *item) float32; slots are the items, filled up to a multiple of the ranks."""

    def __init__(self, layout: Layout, parameters: dict[str, nn.Parameter], gradients: Tensor, ranks: Ranks):
        """gradients  (slots, *item), zeros; gradients that the parameters have already are taken over, like their weights"""
        self.layout, self.gradients = layout, gradients
        slots = gradients.size(0)
        self.weights = torch.zeros_like(gradients)
        share = slots // ranks.size
        self.first, self.stop = share * ranks.rank, share * (ranks.rank + 1)
        self.owned = max(0, min(self.stop, layout.items) - self.first)  # the rest of the share is filling
        for (name, weight), (_, gradient) in zip(self.by_name(self.weights), self.by_name(gradients), strict=True):
            parameter = parameters[name]
            weight.copy_(parameter.detach())
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.data, parameter.grad = weight, gradient

    def share(self, whole: Tensor) -> Tensor:
        """This rank's items and filling of a tensor (slots, *item); a view."""
        return whole[self.first : self.stop]

    def by_name(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its part of a tensor (slots, *item), in its own shape; views."""
        if self.layout.by_rows:
            yield self.layout.names[0], whole[: self.layout.items]
            return
        yield from zip(self.layout.names, whole, strict=False)

    def take_share(self, state: dict[str, Tensor], share: Tensor) -> None:
        """Copy this rank's items out of tensors by parameter name, each in the parameter's shape, to `share`."""
        for i in range(self.owned):
            if self.layout.by_rows:
                share[: self.owned].copy_(state[self.layout.names[0]][self.first : self.first + self.owned])
                return
            share[i].copy_(state[self.layout.names[self.first + i]])


def make_banks(layouts: list[Layout], parameters: dict[str, nn.Parameter], ranks: Ranks) -> tuple[list[Bank], Tensor]:
    """A bank for each layout, and the one buffer that all their gradients are views into: zeroed with one kernel."""
    slots = [-(-layout.items // ranks.size) * ranks.size for layout in layouts]
    sizes = [count * torch.Size(layout.item_shape).numel() for count, layout in zip(slots, layouts, strict=True)]
    device = next(iter(parameters.values())).device
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    banks = []
    for layout, count, part in zip(layouts, slots, flat.split(sizes), strict=True):
        banks.append(Bank(layout, parameters, part.view(count, *layout.item_shape), ranks))
    return banks, flat
