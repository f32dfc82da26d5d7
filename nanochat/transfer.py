"""Between host and device without either waiting for what is queued."""

import torch
from torch import Tensor


def send(source: Tensor, target: Tensor) -> None:
    """Copy from the CPU into a tensor of any device, behind what is queued there."""
    target.copy_(source.pin_memory() if target.device.type == "cuda" else source, non_blocking=True)


def to_device(values: list[float], device: torch.device) -> Tensor:
    """(n,) float64 on the device, without waiting for what it does now."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Readback:
    """Numbers on their way from the device: what is queued after this is not waited for."""

    def __init__(self, values: Tensor, sleep: bool = False):
        """
        values  of any shape; what is written to them later is not what is read
        sleep   while waiting: another thread needs the core more than this one needs the numbers at once
        """
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event(blocking=sleep)
            self._ready.record()
        else:
            self._values, self._ready = values.clone(), None

    def wait(self) -> list:
        """The numbers, in lists as deep as the tensor has dimensions."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.tolist()
