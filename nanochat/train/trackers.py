"""TensorBoard and Weights & Biases, where they are asked for and installed: they receive what log.jsonl holds."""

import importlib.util
import uuid
from pathlib import Path
from typing import Any, Protocol

from nanochat.errors import UserError

# Of a line of log.jsonl: what is a curve.
CURVES = ("loss", "val_bpb", "grad_norm", "learning_rate_scale", "tokens_per_second", "seconds", "loader_seconds")


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def require_installed(names: list[str]) -> None:
    """Raise UserError when the package of one of these trackers is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers = {names}: the package {name} is not installed. "
                f"pip install -e '.[{name}]', or leave it out."
            )


def open_trackers(
    names: list[str], stage: str, folder: Path, first_step: int, settings: dict[str, Any], fingerprint: str
) -> "Trackers":
    """
    folder      of the stage: TensorBoard's files go to <folder>/tensorboard, those of Weights & Biases to <folder>/wandb
    first_step  the next step: what an earlier attempt logged from there on is superseded
    settings    of the stage, kept with the run at Weights & Biases
    fingerprint of the training: another one is another run there, whose steps begin at 1 again
    """
    require_installed(names)
    known = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return Trackers([known[name](stage, folder, first_step, settings, fingerprint) for name in names])


class Trackers:
    """All of a run's; none is fine too."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def log(self, line: dict[str, Any]) -> None:
        """line  of log.jsonl"""
        values = {name: line[name] for name in CURVES if line.get(name) is not None}
        for tracker in self._trackers:
            tracker.log(line["step"], values)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class TensorBoard:
    def __init__(self, stage: str, folder: Path, first_step: int, settings: dict[str, Any], fingerprint: str):
        from torch.utils.tensorboard import SummaryWriter

        self._stage, self._writer = stage, SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._stage}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run for a training, over all its attempts. Without a network: WANDB_MODE=offline. The key comes from the environment."""

    def __init__(self, stage: str, folder: Path, first_step: int, settings: dict[str, Any], fingerprint: str):
        import wandb

        identity = folder / "wandb" / f"id-{fingerprint[:12]}"
        if not identity.exists():
            identity.parent.mkdir(parents=True, exist_ok=True)
            identity.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project="nanochat-slurm",
            name=stage,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=settings,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
