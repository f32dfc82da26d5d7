"""Rows made ahead of their use, so that neither host nor device waits for them."""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
AHEAD = 4  # micro-batches: enough to hide a slow one, small beside the memory of a host


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch on the host, page-locked where the device is a GPU.

    int64, as the model takes them: half the bytes would save 20 us of the bus for a megabyte, and cost a kernel to widen.
    """

    inputs: Tensor  # (rows, T) int64
    targets: Tensor  # (rows, T) int64, -1 carries no loss
    target_count: int

    @classmethod
    def of(cls, inputs: np.ndarray, targets: np.ndarray, device: torch.device) -> "Batch":
        """Copy the arrays to where the device can fetch them by itself."""
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (inputs, targets)]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return cls(*tensors, int((targets >= 0).sum()))

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """inputs and targets on the device; the copy is queued like a kernel."""
        return self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)


class Prefetched(Generic[Item]):
    """An iterator whose items a thread makes ahead of their use.

    They come in the order of `items`; an error in making one is raised where it would have been used. `waited_seconds` is how
    long the user of the items had to wait for them. Ends with `close`, or with the process.
    """

    def __init__(self, items: Iterator[Item], device: torch.device, ahead: int = AHEAD):
        self.waited_seconds = 0.0
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._make, args=(items, device), name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetched[Item]":
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        item, error = self._queue.get()
        self.waited_seconds += time.perf_counter() - started
        if error is not None:
            self._queue.put((None, error))  # for whoever asks again
            raise error
        return item

    def close(self) -> None:
        """End the thread; what it has made ahead is dropped."""
        self._closed.set()
        self._thread.join()

    def _make(self, items: Iterator[Item], device: torch.device) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a new thread begins on GPU 0, and would page-lock for that one
            for item in items:
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:
            self._put(None, error)

    def _put(self, item: Item | None, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
