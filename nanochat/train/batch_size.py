"""Measure how many rows a micro-batch should have, for base, mid or sft.

Reads  --config  results/config/batch_size_<stage>.json
Writes --out     results/batch_size/<stage>.json: the plan that the stage trains with

Every probe trains for real, in a fresh process. Sizes grow until one does not fit in (1 - margin) of the memory, then the
largest one that fits is looked for in between. Only divisors of a step's rows can be chosen, since tokens per step must stay as
configured; of the largest that fit the fastest is taken, the smaller one where they are within 1%. On a CPU memory is
no limit and large batches fall out of the cache: growth ends where it no longer pays.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat import config, hardware
from nanochat.errors import UserError
from nanochat.files import read_json, read_settings, write_json
from nanochat.progress import say
from nanochat.train.plan import rows_per_step

FORMAT = 1
SAME_SPEED = 0.01  # below this difference the smaller batch wins: it leaves memory free
PAYS = 0.03  # on a CPU growth goes on while it gains at least this
FASTEST_OF = 3  # so many of the largest candidates are timed
CPU_FIRST_TOKENS = 1024  # smaller micro-batches than this never won on a CPU


@dataclass(frozen=True)
class Probe:
    """One size tried. ok: it ran; whether it leaves the margin free is another question."""

    device_batch_size: int
    ok: bool
    peak_bytes: int | None
    tokens_per_second: float | None
    seconds: float
    note: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="settings of this stage (JSON)")
    parser.add_argument("--out", required=True, help="plan to write (JSON)")
    parser.add_argument("--no-cache", action="store_true", help="measure even if this was measured before")


def run(arguments: argparse.Namespace) -> None:
    settings = read_settings(arguments.config, config.PlanSettings)
    write_json(arguments.out, make_plan(settings, use_cache=not arguments.no_cache))


def make_plan(settings: config.PlanSettings, use_cache: bool = True) -> dict[str, Any]:
    """The plan: from the settings, the cache or a measurement, in this order."""
    started = time.monotonic()
    stage, gpus = settings.stage, max(settings.gpus, 1)
    rows = rows_per_step(settings.tokens_per_step, settings.sequence_length, gpus, f"train.{stage}") // gpus
    if settings.device_batch_size:
        return _finished(settings, rows, settings.device_batch_size, "override", started)
    device = hardware.pick_device(min(settings.gpus, 1))
    key = cache_key(settings, device)
    cache = Path(settings.batch_size.cache).expanduser() / f"{key}.json" if settings.batch_size.cache else None
    if use_cache and cache and (plan := read_cache(cache, key, rows, lambda message: say("batch_size", message))):
        say("batch_size", f"{stage}: {plan['device_batch_size']} rows a micro-batch, measured before ({cache})")
        return plan | {"stage": stage, "source": "cache", "seconds": time.monotonic() - started}
    capacity = hardware.memory_capacity_bytes(device)
    on_cpu = device.type == "cpu"
    with tempfile.TemporaryDirectory(prefix="nanochat-probe-") as folder:
        path = Path(folder) / "settings.json"
        write_json(path, settings.model_dump(mode="json"))

        def probe(size: int) -> Probe:
            result = run_probe(path, size, capacity, settings.batch_size.probe_timeout_seconds)
            memory = f"{result.peak_bytes / 2**30:.1f} of {capacity / 2**30:.0f} GiB" if result.ok else result.note
            speed = f"{result.tokens_per_second:,.0f} tokens/s, " if result.ok else ""
            say("batch_size", f"{stage}: {size} rows: {speed}{memory}, {result.seconds:.0f} s")
            return result

        found = search(
            probe,
            candidates=[n for n in range(1, settings.batch_size.max_device_batch_size + 1) if rows % n == 0],
            limit_bytes=int(capacity * (1 - settings.batch_size.margin)),
            most=rows if on_cpu else settings.batch_size.max_device_batch_size,
            first=-(-CPU_FIRST_TOKENS // settings.sequence_length) if on_cpu else 1,
            while_it_pays=on_cpu,
        )
    if found.chosen is None:
        raise UserError(
            f"config.yaml: train.{stage}: not even one row of sequence_length = {settings.sequence_length} fits in "
            f"{1 - settings.batch_size.margin:.0%} of {capacity / 2**30:.1f} GiB ({found.probes[-1].note or 'too large'}). "
            f"Lower train.{stage}.sequence_length, model.depth or tokenizer.vocab_size."
        )
    plan = _finished(settings, rows, found.chosen.device_batch_size, "measured", started) | {
        "max_device_batch_size": found.largest,
        "capacity_bytes": capacity,
        "peak_bytes": found.chosen.peak_bytes,
        "probes": [asdict(p) for p in found.probes],
        "reason": found.reason,
        "key": key,
        "device": hardware.device_name(device),
    }
    say("batch_size", f"{stage}: {plan['device_batch_size']} rows x {plan['grad_accum_steps']}: {found.reason}")
    if cache:
        try:
            write_json(cache, plan)
        except OSError as error:
            say("batch_size", f"{cache}: not kept for next time ({error.strerror})")
    return plan


@dataclass(frozen=True)
class Found:
    """The end of a search. chosen None: nothing fits. largest: rows that fit, whether or not they divide a step."""

    chosen: Probe | None
    largest: int | None
    probes: list[Probe]
    reason: str


def search(
    probe: Callable[[int], Probe],
    candidates: list[int],
    limit_bytes: int,
    most: int,
    first: int = 1,
    while_it_pays: bool = False,
) -> Found:
    """Find the fastest candidate whose peak stays below the limit.

    probe          tries a size; called once for each
    candidates     ascending, beginning with 1: the sizes that a step can be split into
    most           largest size worth trying
    first          where growth begins (smaller ones are tried when it does not fit)
    while_it_pays  grow over the candidates, and end when a larger one is no faster; otherwise grow by powers of two to the
                   memory's end
    """
    probes: dict[int, Probe] = {}

    def fits(size: int) -> bool:
        if size not in probes:
            probes[size] = probe(size)
        return probes[size].ok and probes[size].peak_bytes <= limit_bytes

    sizes = [n for n in candidates if n <= most] if while_it_pays else _doubling(most)
    start = max((i for i, n in enumerate(sizes) if n <= first), default=0)
    while start > 0 and not fits(sizes[start]):
        start = max(i for i in range(start) if sizes[i] <= max(1, sizes[start] // 2))
    if not fits(sizes[start]):
        return Found(None, None, list(probes.values()), "nothing fits")
    largest, too_large, stopped_paying = sizes[start], None, False
    for size in sizes[start + 1 :]:
        if while_it_pays and size < 2 * largest and size != sizes[-1]:
            continue
        if not fits(size):
            too_large = size
            break
        gain = (
            probes[size].tokens_per_second
            / max(p.tokens_per_second for p in probes.values() if p.ok and p.device_batch_size < size)
            - 1
        )
        largest = size
        if while_it_pays and gain < PAYS:
            stopped_paying = True
            break
    while too_large and too_large - largest > max(1, largest // 16):
        middle = (largest + too_large) // 2
        if fits(middle):
            largest = middle
        else:
            too_large = middle
    if not while_it_pays:
        for size in [n for n in candidates if n <= largest][-FASTEST_OF:]:
            fits(size)
    usable = [p for n, p in sorted(probes.items()) if n in candidates and fits(n)]
    fastest = max(p.tokens_per_second for p in usable)
    chosen = next(p for p in usable if p.tokens_per_second >= fastest * (1 - SAME_SPEED))
    reason = f"{chosen.tokens_per_second:,.0f} tokens/s, the fastest of {', '.join(str(p.device_batch_size) for p in usable)} rows"
    if chosen.tokens_per_second < fastest:
        reason += f", but for less than {SAME_SPEED:.0%}"
    if stopped_paying:
        reason += "; larger ones no longer gain"
    elif too_large:
        reason += f"; {largest} rows fit in memory"
    return Found(chosen, largest, list(probes.values()), reason)


def run_probe(settings: Path, size: int, capacity_bytes: int, timeout_seconds: float) -> Probe:
    """Try a size in a fresh process. It is ended at the deadline, or when it holds more host memory than there is."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "nanochat.train.probe", str(settings), str(size)]
        process = subprocess.Popen(command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL)
        note = None
        try:
            while process.poll() is None:
                if time.monotonic() - started > timeout_seconds:
                    note = f"ended after {timeout_seconds:.0f} s"
                elif _resident_bytes(process.pid) > capacity_bytes and size > 0:
                    note = "more host memory than there is"
                if note:
                    break
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
            code = process.wait()
        seconds = time.monotonic() - started
        if note or code in (86, -9, 137):
            return Probe(size, False, None, None, seconds, note or "out of memory")
        output.seek(0)
        errors.seek(0)
        if code:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the probe of {size} rows failed with exit code {code}: {last}")
        result = json.loads(output.read().strip().splitlines()[-1])
    return Probe(size, True, result["peak_bytes"], result["tokens_per_second"], seconds)


def cache_key(settings: config.PlanSettings, device: Any) -> str:
    """Digest of all that a plan depends on: sizes, dtype, device, software, and the code of model and trainer."""
    import torch

    what: dict[str, Any] = settings.model_dump(mode="json", exclude={"stage": True, "batch_size": {"cache"}})
    what |= {"format": FORMAT, "device": hardware.device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        what |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "driver": _driver()}
    else:
        what |= {"threads": torch.get_num_threads()}
    package = Path(__file__).parent.parent
    code = hashlib.sha256()
    for path in sorted(itertools.chain((package / "model").glob("*.py"), (package / "train").glob("*.py"))):
        code.update(path.read_bytes())
    what["code"] = code.hexdigest()
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def read_cache(path: Path, key: str, rows: int, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """The plan measured before; None when there is none, or when the file holds something else."""
    if not path.exists():
        return None
    try:
        plan = read_json(path)
        size = plan["device_batch_size"]
        if plan["key"] == key and isinstance(size, int) and size > 0 and size * plan["grad_accum_steps"] == rows:
            return plan
    except (UserError, KeyError, TypeError):
        pass
    tell(f"{path}: not a plan for this; measuring again")
    return None


def _finished(settings: config.PlanSettings, rows: int, size: int, source: str, started: float) -> dict[str, Any]:
    if rows % size:
        nearest = [n for n in range(1, rows + 1) if rows % n == 0]
        raise UserError(
            f"config.yaml: train.{settings.stage}.device_batch_size = {size}: does not divide the {rows} rows that a GPU "
            f"sees in a step. One of {', '.join(map(str, nearest))} would."
        )
    return {
        "stage": settings.stage,
        "device_batch_size": size,
        "grad_accum_steps": rows // size,
        "tokens_per_step": settings.tokens_per_step,
        "sequence_length": settings.sequence_length,
        "gpus": settings.gpus,
        "max_device_batch_size": None,
        "capacity_bytes": None,
        "peak_bytes": None,
        "margin": settings.batch_size.margin,
        "probes": [],
        "reason": "set in the configuration",
        "key": None,
        "seconds": time.monotonic() - started,
        "source": source,
    }


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def _resident_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        return None
