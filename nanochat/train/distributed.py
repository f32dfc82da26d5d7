"""Ranks: who am I, and what all of us must agree on. One process alone needs no process group."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import hardware
from nanochat.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers, as torchrun describes it in the environment."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Rank 0 writes the files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


@contextlib.contextmanager
def world(gpus: int) -> Iterator[World]:
    """Join the other ranks for the length of the block.

    gpus  of the whole job as configured; 0 is the CPU, alone or under torchrun. Raises UserError when the job has received
          another number of processes than GPUs.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if gpus and size != gpus:
        raise UserError(
            f"gpus = {gpus}: {size} process(es) were started. "
            f"Start one for each GPU: torchrun --nproc-per-node {gpus} -m nanochat ..."
        )
    device = hardware.pick_device(gpus)
    if size == 1:
        yield World(0, 1, device)
        return
    # A peer that died shows as a timeout: longer than any save, shorter than a walltime.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=10),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


class Gradients:
    """All gradients as views into one float32 buffer: summed over ranks, scaled and measured in one go each."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float32, device=parameters[0].device)
        first = 0
        for parameter in parameters:
            parameter.grad = self.flat[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()

    def zero(self) -> None:
        self.flat.zero_()

    def norm(self) -> Tensor:
        """Euclidean norm, a scalar on the device; not finite when any gradient is not."""
        return torch.linalg.vector_norm(self.flat)
