"""A profiler trace of some steps, on demand: `train.<stage>.profile_steps: [10, 12]`."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Trace:
    """Records steps `first` to `last`, both included, to <folder>/trace-<first>-<last>-rank<rank>.json.gz.

    The file opens in https://ui.perfetto.dev. The recorded steps are slower than the others; their results are the same.
    """

    def __init__(self, steps: list[int], folder: Path, rank: int, device: torch.device):
        """steps  [first, last], counted from 1; empty: nothing is recorded"""
        self.first, self.last = steps or (0, 0)
        self.path = folder / f"trace-{self.first}-{self.last}-rank{rank}.json.gz"
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """step  the one that begins now, from 1"""
        if self.first <= step <= self.last and self._profile is None:
            self._profile = profile(activities=self._activities)
            self._profile.start()

    def after(self, step: int) -> None:
        if self._profile is not None and step >= self.last:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything: a run that is stopped meanwhile leaves the steps until then."""
        if self._profile is None:
            return
        recorded, self._profile, self.last = self._profile, None, 0
        recorded.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.path))
