"""The training loop of base, mid and sft.

A step is the same whatever the number of ranks and the size of a micro-batch: its rows follow from (seed, step), its loss is the
sum over all target tokens of the step divided by their number, so a micro-batch with few targets (or none) weighs just as
much as it holds. Its state is the step, the weights, the optimizer and the random generators: resuming is exact.
"""

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat import hardware
from nanochat.command_settings import TrainingSettings
from nanochat.data.loader import StepLoader
from nanochat.errors import UserError
from nanochat.files import append_json_line
from nanochat.model.compiled import CompiledLoss
from nanochat.model.gpt import GPT
from nanochat.model.optimizer import Optimizer
from nanochat.progress import Progress, say
from nanochat.train import checkpoint
from nanochat.train.distributed import World
from nanochat.train.history import History, learning_rate_scale
from nanochat.train.prefetch import Batch, Prefetched
from nanochat.train.saving import Saver
from nanochat.train.signals import StopSignals
from nanochat.train.tracing import Trace
from nanochat.train.trackers import Trackers, open_trackers
from nanochat.transfer import Readback, to_device


class NonFinite(Exception):
    """A loss or gradient is nan or infinite; the weights are still those of the step before."""


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
    plan          where micro_rows come from; kept with each checkpoint
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
        plan: dict[str, Any] | None = None,
    ):
        self.settings, self.train, self.world, self.model = settings, settings.train, world, model
        self.loader, self.validation_loader = loader, validation_loader
        self.steps, self.micro_rows = steps, micro_rows
        self.micro_steps = loader.rows_per_step // (world.size * micro_rows)
        assert self.micro_steps * world.size * micro_rows == loader.rows_per_step
        self.checkpoints, self.log, self.fingerprint, self.say = Path(checkpoints), Path(log), fingerprint, say
        self.token_bytes = torch.from_numpy(token_bytes).to(world.device, torch.float32)
        self.compiled = wants_compile(settings.compile, world.device)
        # On a CPU the optimizer's share is too small to pay for compiling it.
        compile_update = self.compiled and world.device.type == "cuda"
        self.optimizer = Optimizer(model, settings.optimizer, ranks=world, compile=compile_update)
        self.forward = CompiledLoss(model) if self.compiled else model
        self.plan = plan
        self.trace = Trace(self.train.profile_steps, self.log.parent, world.rank, world.device)
        self.stop = StopSignals()
        self.saver: Saver | None = None
        self._batches: Prefetched[Batch] | None = None
        self.history, self.step = History(), 0
        self._written_before = 0.0  # by attempts before this one
        self._attempt = os.environ.get("ATTEMPT_TOKEN")

    def run(self) -> bool:
        """Train to the end or to the first stop signal. True when all steps are done; either way a checkpoint holds the state.

        Raises NonFinite, AttemptSuperseded, and what a checkpoint's writing raised.
        """
        with (
            self.stop,
            hardware.GpuUtilization(self.world.device) as utilization,
            contextlib.ExitStack() as ending,
        ):
            ending.callback(self._close)
            attempt_started = hardware.process_started_unix()
            self._open_saver()
            self._resume()
            before = replace(self.history)
            if self.step < self.steps and self.compiled:
                self._compile()
            trackers = self._open_trackers()
            ending.callback(trackers.close)
            self.history.startup_seconds += time.time() - attempt_started
            progress = Progress(self.settings.stage, self.steps, done=self.step)
            saved_at = time.monotonic()
            finished = self.step >= self.steps
            ending.enter_context(_garbage_between_steps())
            if self.step and not finished and self._validation_is_due():
                self.validate()
            while not finished:
                if self.saver:
                    self.saver.check()
                save_due = time.monotonic() - saved_at > self.train.checkpoint_every_seconds
                self.trace.before(self.step + 1)
                line, stopping, save_due = self._step(save_due)
                self.trace.after(self.step)
                finished = self.step >= self.steps
                # Told to stop, little time may be left; what was not validated then is when training goes on.
                if finished or (self._validation_is_due() and not stopping):
                    line["val_bpb"] = self.validate()
                if self.world.leads:
                    append_json_line(self.log, line)
                    trackers.log(line)
                    progress.update(
                        self.step,
                        loss=line["loss"] if line["loss"] is not None else "none",
                        tokens_per_second=line["tokens_per_second"],
                    )
                self.history.seconds = before.seconds + time.time() - attempt_started
                self.history.peak_memory_bytes = max(
                    self.history.peak_memory_bytes, hardware.peak_memory_bytes(self.world.device)
                )
                if stopping or save_due or finished:
                    # All ranks are here, so that all GPUs can be counted.
                    mean, samples = before.with_utilization(*self._over_ranks(utilization))
                    self.history.gpu_utilization, self.history.gpu_utilization_samples = mean, samples
                    self.save(wait=stopping or finished)
                    self.history.seconds = before.seconds + time.time() - attempt_started
                    saved_at = time.monotonic()
                if stopping and not finished:
                    self.say(f"stopped by a signal after step {self.step}; the checkpoint is saved")
                    return False
        return True

    def _over_ranks(self, utilization: hardware.GpuUtilization) -> tuple[float | None, int]:
        """Mean utilisation of the GPUs of all ranks, and the number of samples that it is of."""
        sums = torch.tensor([utilization.total, utilization.samples], dtype=torch.float64, device=self.world.device)
        self.world.sum(sums)
        total, samples = sums.tolist()
        return (total / samples if samples else None), round(samples)

    def _step(self, save_due: bool) -> tuple[dict[str, Any], bool, bool]:
        """One optimizer step. Returns its log line, and whether any rank was told to stop, and whether rank 0 wants a save."""
        started = time.perf_counter()
        step, world, optimizer = self.step, self.world, self.optimizer
        optimizer.zero_gradients()
        losses, targets_seen = [], 0
        batches = self._training_batches()
        waited_before = batches.waited_seconds
        # Until the count of all targets is known, losses are divided by the step's tokens: magnitudes stay near the mean's.
        tokens = self.loader.rows_per_step * self.loader.sequence_length
        for _ in range(self.micro_steps):
            batch = next(batches)
            inputs, targets = batch.to(world.device)
            targets_seen += batch.target_count
            loss = self.forward(inputs, targets, reduction="sum")
            (loss / tokens).backward()
            losses.append(loss.detach())
        local = torch.stack(losses).double()
        told = to_device([targets_seen, self.stop.received is not None, save_due and world.leads], world.device)
        sums = torch.cat([local.sum()[None], optimizer.reduce_gradients()[None], told])
        world.sum(sums)
        finite, any_target = torch.isfinite(sums[:2]).all(), sums[2] > 0
        # The host reads what the device knows before the update, while the update runs: it is never without work. So what is
        # not finite is kept from the weights on the device, and the host learns of it before the next step.
        numbers = Readback(sums, sleep=True)  # its core is the loader's meanwhile
        rate = learning_rate_scale(step, self.steps, self.train)
        optimizer.step(step, rate, tokens / sums[2].clamp_min(1), finite & any_target)
        loss_sum, norm_squared, targets, stopped, saving = numbers.wait()
        norm, scale = norm_squared**0.5, tokens / max(targets, 1)
        finite = bool(np.isfinite(loss_sum) and np.isfinite(norm))
        if not finite:
            self._nonfinite(local, loss_sum, norm)
        seconds, waited = time.perf_counter() - started, batches.waited_seconds - waited_before
        mean = loss_sum / targets if targets and finite else None
        history = self.history
        history.count_step(tokens, int(targets), seconds, mean)
        history.loader_seconds += waited
        history.skipped_steps += not finite
        self.step += 1
        line = {
            "step": self.step,
            "loss": mean,
            "learning_rate_scale": rate,
            "tokens": history.tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "loader_seconds": waited,
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
        if rows and not self.world.leads:  # who has them names them
            say(self.settings.stage, f"{message}; this step is skipped")
        else:
            self.say(f"{message}; this step is skipped")

    def _validation_is_due(self) -> bool:
        done = self.history.val_bpb[-1][0] if self.history.val_bpb else 0
        return self.step % self.train.validate_every_steps == 0 and done < self.step

    def validate(self) -> float | None:
        """Bits per byte of held-out text: nats of the target tokens / (ln 2 x bytes they stand for). Special tokens do not count."""
        if self.validation_loader is None:
            return None
        started = time.perf_counter()
        loader, world = self.validation_loader, self.world
        rows = max(1, min(self.train.validation_tokens // loader.sequence_length, loader.rows_per_epoch))
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        batches = Prefetched(self._validation_batches(rows), world.device)
        with contextlib.closing(batches), torch.no_grad():
            for batch in batches:
                inputs, targets = batch.to(world.device)
                losses = self.forward(inputs, targets, reduction="none")
                text_bytes = self.token_bytes[targets.clamp_min(0)] * (targets >= 0)
                sums[0] += (losses * (text_bytes > 0)).sum()
                sums[1] += text_bytes.sum()
        world.sum(sums)
        nats, text_bytes = sums.tolist()
        bits = nats / (np.log(2) * text_bytes) if text_bytes and np.isfinite(nats) else None
        if bits is not None:
            self.history.val_bpb.append((self.step, bits))
        gc.collect()
        self.history.validation_seconds += time.perf_counter() - started
        return bits

    def save(self, wait: bool = True) -> None:
        """Save a checkpoint of the steps done so far: copied at once, written beside the next steps.

        wait  until it is on the disk
        """
        started = time.perf_counter()
        # Every rank gives its share of the optimizer's state; rank 0 alone keeps and writes.
        if self.saver:
            self.saver.save(self.step, self._tensors(), self._generators(), self._state())
            if wait:
                self.saver.wait()
        else:
            for _ in self.optimizer.state():
                pass
        gc.collect()
        self.history.checkpoint_seconds += time.perf_counter() - started

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, tensor in self.optimizer.state():
            yield f"optimizer.{name}", tensor

    def _generators(self) -> dict[str, Tensor]:
        states = {"rng.cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            states["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        return states

    def _state(self) -> dict[str, Any]:
        self.history.checkpoint_write_seconds = self._written_before + self.saver.write_seconds
        return {"steps_planned": self.steps, "history": asdict(self.history), "plan": self.plan}

    def _open_saver(self) -> None:
        if self.world.leads:
            like = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
            like |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_like().items()}
            keep, device = self.train.keep_checkpoints, self.world.device
            self.saver = Saver(self.checkpoints, self.fingerprint, keep, like, device)

    def _open_trackers(self) -> Trackers:
        names = self.settings.trackers if self.world.leads else []
        stage, settings = self.settings.stage, self.settings.model_dump(mode="json")
        return open_trackers(names, stage, self.log.parent, self.step + 1, settings, self.fingerprint)

    def _close(self) -> None:
        """Let go of threads and memory. A checkpoint that is being written is finished first."""
        self.trace.close()
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        if self.saver:
            if error := self.saver.close():
                self.say(f"the last checkpoint was not written: {error!r}")
            self.history.checkpoint_write_seconds = self._written_before + self.saver.write_seconds
            self.saver = None

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        newest = checkpoint.newest_valid(self.checkpoints, self.fingerprint, self.say if self.world.leads else _silent)
        # Rank 0 decides: another rank may see a shared folder a moment later.
        step = self.world.share(newest.step if newest else None)
        if step is None:
            if self.world.leads and any(self.checkpoints.glob("step-*")):
                self.say(
                    f"{self.checkpoints}: no valid checkpoint of these settings and inputs; training begins at step 1"
                )
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
        self._written_before = self.history.checkpoint_write_seconds
        self.step = newest.step
        if self.step < self.steps:
            self.history.restarts += 1
            self.say(f"going on from {newest.folder}")
        else:
            self.say(f"all {self.steps} steps are in {newest.folder}")

    def _compile(self) -> None:
        """Run the first micro-batch and an update that changes nothing, so that what compiling takes is no part of a step.

        Nor its memory: trying kernels out takes up to 1.4 GiB, on top of a backward pass, where the compilers' caches are empty.
        """
        started = time.perf_counter()
        rows = self.loader.micro_batch(self.step, self._first_row(0), self.micro_rows)
        inputs, targets = Batch.of(*rows, self.world.device).to(self.world.device)
        self.forward(inputs, targets, reduction="sum").backward()
        self.optimizer.step(self.step, 0.0, ok=torch.zeros((), dtype=torch.bool, device=self.world.device))
        hardware.synchronize(self.world.device)
        hardware.reset_peak_memory(self.world.device)
        self.history.compile_seconds += time.perf_counter() - started

    def _training_batches(self) -> Prefetched[Batch]:
        """This rank's micro-batches from the step on that is next."""
        if self._batches is None:

            def batches(first_step: int) -> Iterator[Batch]:
                for step in range(first_step, self.steps):
                    for micro in range(self.micro_steps):
                        rows = self.loader.micro_batch(step, self._first_row(micro), self.micro_rows)
                        yield Batch.of(*rows, self.world.device)

            self._batches = Prefetched(batches(self.step), self.world.device)
        return self._batches

    def _validation_batches(self, rows: int) -> Iterator[Batch]:
        """This rank's share of the first `rows` held-out rows."""
        loader, world = self.validation_loader, self.world
        for first in range(world.rank * self.micro_rows, rows, world.size * self.micro_rows):
            count = min(self.micro_rows, rows - first)
            # The last micro-batch is filled up with rows that carry no loss: one shape, one compiled graph.
            inputs = np.zeros((self.micro_rows, loader.sequence_length), dtype=np.int64)
            targets = np.full_like(inputs, -1)
            inputs[:count], targets[:count] = loader.micro_batch(0, first, count)
            yield Batch.of(inputs, targets, world.device)

    def _first_row(self, micro: int) -> int:
        return (micro * self.world.size + self.world.rank) * self.micro_rows


@contextlib.contextmanager
def _garbage_between_steps() -> Iterator[None]:
    """No garbage collection inside of a step: a pause on one rank is a pause on all. It is done at validations and saves."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _silent(_: str) -> None:
    return
