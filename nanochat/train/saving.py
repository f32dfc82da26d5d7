"""Checkpoints beside the training: what is saved is copied to the host at once and written by a thread.

Training waits for the copy alone. A write that failed is raised at the next opportunity, never passed over.
"""

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.train import checkpoint

ALIGNMENT_BYTES = 64


class HostCopy:
    """Room on the host for a copy of tensors, page-locked where they come from a GPU: a copy then runs at the bus' speed.

    Page-locking some gigabytes takes seconds, so a thread does it once, beside compiling.
    """

    def __init__(self, like: dict[str, Tensor], device: torch.device):
        """like  a tensor of the shape and dtype of each that will be copied"""
        self.device = device
        self._places, size = {}, 0
        for name, tensor in like.items():
            self._places[name] = (size, tensor.shape, tensor.dtype)
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._size_bytes, self._locked = size, False
        self._room: Tensor | None = None
        self._thread = threading.Thread(target=self._allocate, name="host memory", daemon=True)
        if device.type == "cuda":
            self._thread.start()

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy each tensor before the next is asked for; good until the next call."""
        self._wait_for_room()
        copies = {}
        for name, tensor in tensors:
            first, shape, dtype = self._places[name]
            room = self._room[first : first + tensor.numel() * tensor.element_size()]
            copies[name] = room.view(dtype).view(shape)
            copies[name].copy_(tensor.detach(), non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies

    def close(self) -> None:
        if self.device.type == "cuda":
            self._thread.join()
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._room.data_ptr())
        self._room, self._locked = None, False

    def _wait_for_room(self) -> None:
        if self.device.type == "cuda":
            self._thread.join()
        if self._room is None:
            self._allocate()

    def _allocate(self) -> None:
        room = torch.empty(self._size_bytes, dtype=torch.uint8)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # Not torch's page-locked allocator: it rounds up to a power of two. Where it fails, copies are slower.
            self._locked = int(torch.cuda.cudart().cudaHostRegister(room.data_ptr(), self._size_bytes, 0)) == 0
        self._room = room


class Saver:
    """Saves the checkpoints of one run, on the rank that writes files."""

    def __init__(self, folder: Path, fingerprint: str, keep: int, like: dict[str, Tensor], device: torch.device):
        """like  for HostCopy: all weights and all of the optimizer's state, under `model.` and `optimizer.`"""
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self.write_seconds = 0.0
        self._copy = HostCopy(like, device)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, tensors: Iterable[tuple[str, Tensor]], generators: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Copy, and begin to write. Waits for the write before this one, and raises what it raised.

        generators  states of the random generators, on the host
        state       for checkpoint.save; it must not change later
        """
        self.wait()
        copies = self._copy.take(tensors)
        model = {name.removeprefix("model."): t for name, t in copies.items() if name.startswith("model.")}
        optimizer = {name.removeprefix("optimizer."): t for name, t in copies.items() if name.startswith("optimizer.")}
        arguments = (step, model, optimizer | generators, state)
        # No daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint of step {step}")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last write raised, if it failed already."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what its write raised, AttemptSuperseded among it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> BaseException | None:
        """Let a write end that is under way, and give the memory back. Returns what that write raised, if it did."""
        if self._thread is not None:
            self._thread.join()
        self._copy.close()
        return self._error

    def _write(self, step: int, model: dict, optimizer: dict, state: dict) -> None:
        started = time.perf_counter()
        try:
            checkpoint.save(self.folder, step, self.fingerprint, model, optimizer, state, self.keep)
        except BaseException as error:
            error.add_note(f"while the checkpoint of step {step} was written to {self.folder}")
            self._error = error
        self.write_seconds += time.perf_counter() - started
