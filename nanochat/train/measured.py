"""What probes measured, kept for the next search: one file for all that a probe depends on.

A file that is damaged, or holds something else, counts as absent. Several jobs may write it at once: each writes it whole and takes
over what it finds, so a probe can at worst be lost and measured again.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanochat import command_settings, hardware
from nanochat.errors import UserError
from nanochat.files import read_json, write_json
from nanochat.progress import say
from nanochat.train.search import Probe

FORMAT = 3
OUT_OF_MEMORY = "out of memory"  # of the GPU: the one failure that is kept, since others may be this job's
FAILED_LATER = "training ran out of memory with it"
# Of the settings these decide what is made of the probes, not what they measure.
NOT_MEASURED = {"stage", "ranks", "tokens_per_step", "device_batch_size", "batch_size"}


class Measured:
    """Probes by size, those of the file and those that are added."""

    def __init__(self, path: Path | None, key: str, probes: dict[int, dict[str, Any]]):
        self.path, self.key, self.probes = path, key, probes
        self.is_new = False

    @classmethod
    def load(cls, folder: str, key: str, use: bool, tell: Callable[[str], None]) -> "Measured":
        """What the folder holds for this key, nothing unless `use`; no folder: nothing is kept."""
        path = Path(folder).expanduser() / f"{key}.json" if folder else None
        probes = {}
        if use and path and path.exists():
            try:
                probes = _read(path, key)
            except (UserError, KeyError, TypeError, ValueError, AttributeError):
                tell(f"{path}: not what was measured of this; measuring again")
        return cls(path, key, probes)

    @property
    def sizes(self) -> list[int]:
        return sorted(self.probes)

    @property
    def dtype(self) -> str:
        return next(one["dtype"] for one in self.probes.values() if one["ok"])

    @property
    def beside_bytes(self) -> int:
        """Memory of the device that is used beside the caching allocator's."""
        return max(one["beside_bytes"] for one in self.probes.values() if one["ok"])

    def ran(self, size: int, result: dict[str, Any], seconds: float) -> None:
        """A size that was measured before has the mean of its times and the larger of its peaks."""
        line = {"device_batch_size": size, "ok": True, "seconds": seconds, "note": None, "timings": 1, **result}
        before = self.probes.get(size, {})
        if before.get("ok"):
            n = line["timings"] = before["timings"] + 1
            for name in ("micro_step_seconds", "optimizer_seconds"):
                line[name] = before[name] + (line[name] - before[name]) / n
            line["seconds"] += before["seconds"]
            line["peak_bytes"] = max(line["peak_bytes"], before["peak_bytes"])
        self._add(size, line)

    def did_not_run(self, size: int, note: str, seconds: float) -> None:
        self._add(size, {"device_batch_size": size, "ok": False, "seconds": seconds, "note": note})

    def probe(self, size: int, rows: int, sequence_length: int) -> Probe:
        """With the speed of a step of `rows` rows on this device: its micro-steps and one update.

        A size that does not split the step is compared at the same tokens an update: with more of them any size looks faster.
        """
        one = self.probes[size]
        if not one["ok"]:
            return Probe(size, False, None, None, one["seconds"], one["note"])
        seconds = rows / size * one["micro_step_seconds"] + one["optimizer_seconds"]
        speed = rows * sequence_length / seconds
        return Probe(size, True, one["peak_bytes"], speed, one["seconds"], timings=one["timings"])

    def _add(self, size: int, line: dict[str, Any]) -> None:
        self.probes[size], self.is_new = line, True
        if self.path and (line["ok"] or line["note"] == OUT_OF_MEMORY):
            _merge(self.path, self.key, [line])


def mark_as_too_large(path: str | Path, key: str, size: int) -> None:
    """Training ran out of memory with this many rows: no search shall choose them, or more, again."""
    path = Path(path)
    try:
        sizes = {size, *(n for n in _read(path, key) if n > size)}
    except (OSError, UserError, KeyError, TypeError, ValueError, AttributeError):
        sizes = {size}
    failed = {"ok": False, "seconds": 0.0, "note": FAILED_LATER}
    _merge(path, key, [{"device_batch_size": n, **failed} for n in sorted(sizes)])


def cache_key(settings: command_settings.PlanSettings, gpu: hardware.Gpu | None) -> str:
    """Digest of all that a probe depends on: sizes, dtype, compile mode, device, software, and the code of model and training.

    The learning rates are not in it, and of the optimizer nothing but its code decides.
    """
    what: dict[str, Any] = {"format": FORMAT, **settings.model_dump(mode="json", exclude=NOT_MEASURED)}
    if gpu:
        what |= {"gpu": gpu.name, "memory_bytes": gpu.memory_bytes, "driver": gpu.driver}
    else:
        what |= {"cpu": hardware.cpu_name(), "threads": os.environ.get("OMP_NUM_THREADS")}
    what["allocator"] = [os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")]
    torch = importlib.util.find_spec("torch")  # found, not imported: that takes seconds
    what["torch"] = (Path(torch.origin).parent / "version.py").read_text() if torch and torch.origin else None
    code, package = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(path for room in ("model", "train") for path in (package / room).glob("*.py")):
        code.update(path.read_bytes())
    what["code"] = code.hexdigest()
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _merge(path: Path, key: str, lines: list[dict[str, Any]]) -> None:
    """Add these to what the file holds by now; what failed in training stays failed."""
    try:
        probes = _read(path, key)
    except (OSError, UserError, KeyError, TypeError, ValueError, AttributeError):
        probes = {}
    for line in lines:
        if probes.get(line["device_batch_size"], {}).get("note") != FAILED_LATER:
            probes[line["device_batch_size"]] = line
    try:
        write_json(path, {"key": key, "probes": [probes[size] for size in sorted(probes)]})
    except OSError as error:
        say("batch_size", f"{path}: not kept for next time ({error.strerror})")


def _read(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """Raises one of several errors unless these are well-formed probes of this key."""
    content = read_json(path)
    if content["key"] != key:
        raise ValueError(key)
    probes = {}
    for one in content["probes"]:
        numbers = ["seconds"]
        if one["ok"]:
            numbers += ["peak_bytes", "micro_step_seconds", "optimizer_seconds", "beside_bytes", "timings"]
        if one["device_batch_size"] < 1 or not all(one[name] >= 0 for name in numbers):
            raise ValueError(key)
        if one["ok"] and (not one["micro_step_seconds"] > 0 or one["dtype"] not in ("float32", "bfloat16")):
            raise ValueError(key)
        probes[one["device_batch_size"]] = one | {"note": one.get("note")}
    return probes
