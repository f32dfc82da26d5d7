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

# Names since torch 2.13, and those before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


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

    def reduce_scatter(self, tensor: Tensor) -> "dist.Work | None":
        """Begin to replace this rank's share, along the first dimension, by its sum over all ranks; the rest is undefined then."""
        if self.size == 1:
            return None
        if dist.get_backend() == "gloo":
            return dist.all_reduce(tensor, async_op=True)
        return _reduce_scatter(self._share_of(tensor), tensor, async_op=True)

    def all_gather(self, tensor: Tensor) -> "dist.Work | None":
        """Begin to give each rank's share of the tensor, along the first dimension, to all ranks."""
        if self.size == 1:
            return None
        return _all_gather(tensor, self._share_of(tensor), async_op=True)

    def _share_of(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.size, -1, *tensor.shape[1:])[self.rank]

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
