"""What a run has done so far, and the schedule that it follows."""

from dataclasses import dataclass, field

from nanochat.config import Stage


@dataclass
class History:
    """Over all its attempts whose steps survive. Saved with each checkpoint.

    useful_seconds           of the steps themselves; loader_seconds, the wait for rows, is a part of them
    checkpoint_seconds       for which training waited; checkpoint_write_seconds were spent beside it
    gpu_utilization          mean of so many samples, of all ranks' GPUs
    """

    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    useful_seconds: float = 0.0
    loader_seconds: float = 0.0
    startup_seconds: float = 0.0
    compile_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    checkpoint_write_seconds: float = 0.0
    validation_seconds: float = 0.0
    restarts: int = 0
    skipped_steps: int = 0
    peak_memory_bytes: int = 0
    gpu_utilization: float | None = None
    gpu_utilization_samples: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    val_bpb: list[tuple[int, float]] = field(default_factory=list)

    def with_utilization(self, mean: float | None, samples: int) -> tuple[float | None, int]:
        """gpu_utilization and its number of samples, with so many more of that mean."""
        if not samples or mean is None:
            return self.gpu_utilization, self.gpu_utilization_samples
        total = samples + self.gpu_utilization_samples
        return (mean * samples + (self.gpu_utilization or 0.0) * self.gpu_utilization_samples) / total, total

    def count_step(self, tokens: int, target_tokens: int, seconds: float, mean_loss: float | None) -> None:
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.useful_seconds += seconds
        if mean_loss is not None:
            self.loss_first = mean_loss if self.loss_first is None else self.loss_first
            self.loss_last = mean_loss


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
