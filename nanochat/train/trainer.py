"""The training loop of base, mid and sft.

A step is the same whatever the number of ranks and the size of a micro-batch: its rows follow from (seed, step), its loss is the
sum over all target tokens of the step divided by their number, so a micro-batch with few targets (or none) weighs just as
much as it holds. Its state is the step, the weights, the optimizer and the random generators: resuming is exact.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat import hardware
from nanochat.config import Stage, TrainingSettings
from nanochat.data.loader import StepLoader
from nanochat.errors import UserError
from nanochat.files import append_json_line
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import Optimizer
from nanochat.progress import Progress
from nanochat.train import checkpoint
from nanochat.train.distributed import Gradients, World
from nanochat.train.signals import StopSignals


class NonFinite(Exception):
    """A loss or gradient is nan or infinite; the weights are still those of the step before."""


@dataclass
class History:
    """What a run has done so far, over all its attempts whose steps survive. Saved with each checkpoint."""

    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    useful_seconds: float = 0.0
    startup_seconds: float = 0.0
    compile_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    validation_seconds: float = 0.0
    restarts: int = 0
    skipped_steps: int = 0
    peak_memory_bytes: int = 0
    gpu_utilization: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    val_bpb: list[tuple[int, float]] = field(default_factory=list)


def learning_rate_scale(step: int, steps: int, train: Stage) -> float:
    """Warmup, constant, decay, times the stage's own factor: what all learning rates are multiplied by at `step` (from 0)."""
    warmup, decay = round(train.warmup_fraction * steps), round(train.decay_fraction * steps)
    if step < warmup:
        share = (step + 1) / warmup
    elif step < steps - decay:
        share = 1.0
    else:
        left = (steps - step) / decay
        share = left + (1 - left) * train.final_learning_rate_fraction
    return train.learning_rate_scale * share


def wants_compile(setting: str, device: torch.device) -> bool:
    """auto: on a GPU. On a CPU compiling took 28 to 58 s and gave 1.1x for the local profile's model (2 cores): off."""
    if setting == "on" and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("train.compile = on: no C++ compiler (g++) here. Set it to auto or off.")
    return setting == "on" or (setting == "auto" and device.type == "cuda")


class Trainer:
    """Trains a model for `steps` steps.

    model         with weights, on the device, compute_dtype set
    loader        of the training rows; validation_loader of the held-out ones, in order
    token_bytes   (V,) bytes of text each token stands for, 0 for special tokens
    micro_rows    rows of a micro-batch; it must divide the step's rows on this rank
    checkpoints   folder
    log           log.jsonl. On resuming a step may be written again: the last line of a step counts. So steps
                  after the checkpoint's are superseded as soon as they are done once more
    """

    def __init__(
        self,
        settings: TrainingSettings,
        world: World,
        model: GPT,
        loader: StepLoader,
        validation_loader: StepLoader | None,
        token_bytes: np.ndarray,
        steps: int,
        micro_rows: int,
        checkpoints: str | Path,
        log: str | Path,
        fingerprint: str,
        say: Callable[[str], None] = lambda message: None,
    ):
        self.settings, self.train, self.world, self.model = settings, settings.train, world, model
        self.loader, self.validation_loader = loader, validation_loader
        self.steps, self.micro_rows = steps, micro_rows
        self.micro_steps = loader.rows_per_step // (world.size * micro_rows)
        assert self.micro_steps * world.size * micro_rows == loader.rows_per_step
        self.checkpoints, self.log, self.fingerprint, self.say = Path(checkpoints), Path(log), fingerprint, say
        self.token_bytes = torch.from_numpy(token_bytes).to(world.device, torch.float32)
        self.optimizer = Optimizer(model, settings.optimizer)
        self.gradients = Gradients(list(model.parameters()))
        compiled = wants_compile(settings.compile, world.device)
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        self.compiled = compiled
        self.history, self.step = History(), 0
        self._attempt = os.environ.get("ATTEMPT_TOKEN")

    def run(self) -> bool:
        """Train to the end or to the first stop signal. True when all steps are done; either way a checkpoint holds the state.

        Raises NonFinite, AttemptSuperseded.
        """
        with StopSignals() as stop, hardware.GpuUtilization(self.world.device) as utilization:
            attempt_started = hardware.process_started_unix()
            self._resume()
            before = self.history.seconds
            if self.step < self.steps and self.compiled:
                self._compile()
            self.history.startup_seconds += time.time() - attempt_started
            progress = Progress(self.settings.stage, self.steps, done=self.step)
            saved_at = time.monotonic()
            finished = self.step >= self.steps
            while not finished:
                save_due = time.monotonic() - saved_at > self.train.checkpoint_every_seconds
                line, stopping, save_due = self._step(stop.received is not None, save_due)
                finished = self.step >= self.steps
                if finished or self.step % self.train.validate_every_steps == 0:
                    line["val_bpb"] = self.validate()
                if self.world.leads:
                    append_json_line(self.log, line)
                    progress.update(
                        self.step,
                        loss=line["loss"] if line["loss"] is not None else "none",
                        tokens_per_second=line["tokens_per_second"],
                    )
                self.history.seconds = before + time.time() - attempt_started
                self.history.gpu_utilization = utilization.mean
                self.history.peak_memory_bytes = max(
                    self.history.peak_memory_bytes, hardware.peak_memory_bytes(self.world.device)
                )
                if stopping or save_due or finished:
                    self.save()
                    saved_at = time.monotonic()
                if stopping and not finished:
                    self.say(f"stopped by a signal after step {self.step}; the checkpoint is saved")
                    return False
        return True

    def _step(self, stop: bool, save_due: bool) -> tuple[dict[str, Any], bool, bool]:
        """One optimizer step. Returns its log line, and whether any rank was told to stop, and whether rank 0 wants a save."""
        started = time.perf_counter()
        step, world = self.step, self.world
        self.gradients.zero()
        losses, targets_seen = [], 0
        # Until the count of all targets is known, losses are divided by the step's tokens: magnitudes stay near the mean's.
        tokens = self.loader.rows_per_step * self.loader.sequence_length
        for micro in range(self.micro_steps):
            inputs, targets = self.loader.micro_batch(step, self._first_row(micro), self.micro_rows)
            targets_seen += int((targets >= 0).sum())
            loss = self.forward(self._to_device(inputs), self._to_device(targets), reduction="sum")
            (loss / tokens).backward()
            losses.append(loss.detach())
        local = torch.stack(losses)
        leader_saves = float(save_due and world.leads)
        shared = torch.tensor([0.0, targets_seen, float(stop), leader_saves], dtype=torch.float64)
        shared = shared.to(world.device)
        shared[0] = local.sum()
        world.sum(shared)
        world.sum(self.gradients.flat)
        # The one wait for the device in a step: what is not finite must not reach weights or optimizer state.
        loss_sum, targets, stopped, saving, norm = torch.cat([shared, self.gradients.norm()[None]]).tolist()
        scale = tokens / max(targets, 1)
        rate = learning_rate_scale(step, self.steps, self.train)
        finite = np.isfinite(loss_sum) and np.isfinite(norm)
        if not finite:
            self._nonfinite(local, loss_sum, norm)
        elif targets:
            if scale != 1:
                self.gradients.flat.mul_(scale)
            self.optimizer.step(step, rate)
        seconds = time.perf_counter() - started
        history = self.history
        history.tokens += tokens
        history.target_tokens += int(targets)
        history.useful_seconds += seconds
        history.skipped_steps += not finite
        mean = loss_sum / targets if targets and finite else None
        if mean is not None:
            history.loss_first = mean if history.loss_first is None else history.loss_first
            history.loss_last = mean
        self.step += 1
        line = {
            "step": self.step,
            "loss": mean,
            "learning_rate_scale": rate,
            "tokens": history.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "grad_norm": norm * scale if finite else None,
            "val_bpb": None,
            "time": time.time(),
            "attempt": self._attempt,
            "restart": history.restarts,
        }
        return line, stopped > 0, saving > 0

    def _nonfinite(self, local: Tensor, loss_sum: float, norm: float) -> None:
        """Name the rows that did it; raise unless such steps are to be skipped."""
        bad = [micro for micro, loss in enumerate(local.tolist()) if not np.isfinite(loss)]
        rows = [f"{self._first_row(m)} to {self._first_row(m) + self.micro_rows - 1}" for m in bad]
        if rows:
            where = f"the loss of rows {', '.join(rows)} of the step (rank {self.world.rank})"
        elif not np.isfinite(loss_sum):
            where = "the loss of another rank's rows"
        else:
            where = f"the gradient (norm {norm}) of rows 0 to {self.loader.rows_per_step - 1}"
        message = f"step {self.step + 1}: {where} is not finite"
        if self.settings.on_nonfinite == "stop":
            raise NonFinite(
                f"{message}. Stopped before it reached the weights or a checkpoint. "
                "Lower train.optimizer's learning rates, or set train.on_nonfinite: skip."
            )
        self.say(f"{message}; this step is skipped")

    def validate(self) -> float | None:
        """Bits per byte of held-out text: nats of the target tokens / (ln 2 x bytes they stand for). Special tokens do not count."""
        if self.validation_loader is None:
            return None
        started = time.perf_counter()
        loader, world = self.validation_loader, self.world
        rows = max(1, min(self.train.validation_tokens // loader.sequence_length, loader.rows_per_epoch))
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        with torch.no_grad():
            for first in range(world.rank * self.micro_rows, rows, world.size * self.micro_rows):
                count = min(self.micro_rows, rows - first)
                # The last micro-batch is filled up with rows that carry no loss: one shape, one compiled graph.
                inputs = np.zeros((self.micro_rows, loader.sequence_length), dtype=np.int64)
                targets = np.full_like(inputs, -1)
                inputs[:count], targets[:count] = loader.micro_batch(0, first, count)
                inputs, targets = self._to_device(inputs), self._to_device(targets)
                losses = self.forward(inputs, targets, reduction="none")
                text_bytes = self.token_bytes[targets.clamp_min(0)] * (targets >= 0)
                sums[0] += (losses * (text_bytes > 0)).sum()
                sums[1] += text_bytes.sum()
        world.sum(sums)
        nats, text_bytes = sums.tolist()
        bits = nats / (np.log(2) * text_bytes) if text_bytes and np.isfinite(nats) else None
        if bits is not None:
            self.history.val_bpb.append((self.step, bits))
        self.history.validation_seconds += time.perf_counter() - started
        return bits

    def save(self) -> None:
        """Write a checkpoint of the steps done so far."""
        started = time.perf_counter()
        if self.world.leads:
            tensors = self.optimizer.state_dict() | {"rng.cpu": torch.get_rng_state()}
            if self.world.device.type == "cuda":
                tensors["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
            checkpoint.save(
                self.checkpoints,
                self.step,
                self.fingerprint,
                self.model.state_dict(),
                tensors,
                {"steps_planned": self.steps, "history": asdict(self.history)},
                self.train.keep_checkpoints,
            )
        self.history.checkpoint_seconds += time.perf_counter() - started

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        newest = checkpoint.newest_valid(self.checkpoints, self.fingerprint, self.say if self.world.leads else _silent)
        # Rank 0 decides: another rank may see a shared folder a moment later.
        step = self.world.share(newest.step if newest else None)
        if step is None:
            return
        if newest is None or newest.step != step:
            raise UserError(
                f"{self.checkpoints}: rank 0 sees the checkpoint of step {step}, rank {self.world.rank} does not."
            )
        self.model.load_state_dict(newest.model())
        state = newest.optimizer()
        torch.set_rng_state(state.pop("rng.cpu"))
        cuda_state = state.pop("rng.cuda", None)
        if cuda_state is not None and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_state, self.world.device)
        self.optimizer.load_state_dict(state)
        self.history = History(**newest.state["history"])
        self.step = newest.step
        if self.step < self.steps:
            self.history.restarts += 1
            self.say(f"going on from {newest.folder}")
        else:
            self.say(f"all {self.steps} steps are in {newest.folder}")

    def _compile(self) -> None:
        """Run the first micro-batch forward and backward, so that what compiling takes is no part of a step's time."""
        started = time.perf_counter()
        inputs, targets = self.loader.micro_batch(self.step, self._first_row(0), self.micro_rows)
        self.forward(self._to_device(inputs), self._to_device(targets), reduction="sum").backward()
        self.gradients.zero()
        hardware.synchronize(self.world.device)
        self.history.compile_seconds += time.perf_counter() - started

    def _first_row(self, micro: int) -> int:
        return (micro * self.world.size + self.world.rank) * self.micro_rows

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.world.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.world.device, non_blocking=True)


def _silent(_: str) -> None:
    return
