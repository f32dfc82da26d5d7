"""A small real run in the documented format of the files; what the tests of this room share."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from nanochat import command_settings, config, hardware
from nanochat.files import read_json_lines, sha256, write_json
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.distributed import World
from nanochat.train.trainer import Trainer

VOCAB, LENGTH, ROWS = 67, 16, 8
MODEL = config.Model(depth=2, width=32, head_dim=8)


class PlainLoader:
    """Rows of learnable text (each token follows from the one before), a pure function of (step, row)."""

    def __init__(self, rows_per_step: int = ROWS, hidden: float = 0.0):
        """hidden  share of the targets without loss; row 0 of each step then has none at all"""
        self.rows_per_step, self.sequence_length, self.rows_per_epoch = rows_per_step, LENGTH, 64
        self.hidden, self.asked = hidden, []

    def micro_batch(self, step: int, first_row: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = np.empty((2, rows, LENGTH), dtype=np.int64)
        for i in range(rows):
            row = first_row + i
            self.asked.append((step, row))
            random = np.random.default_rng([step, row])
            text = (random.integers(VOCAB) + np.arange(LENGTH + 1) * (1 + row % 3)) % VOCAB
            inputs[i], targets[i] = text[:-1], text[1:]
            if self.hidden:
                targets[i][random.random(LENGTH) < (1 if row == 0 else self.hidden)] = -1
        return inputs.astype(np.int64), targets.astype(np.int64)


def training_settings(**train: Any) -> command_settings.TrainingSettings:
    top = {key: train.pop(key) for key in ("on_nonfinite", "seed", "dtype", "compile", "trackers") if key in train}
    values = {"gpus": 0, "sequence_length": LENGTH, "tokens_per_step": ROWS * LENGTH, "checkpoint_every_seconds": 1e9}
    values |= {"validate_every_steps": 4, "validation_tokens": 64, "warmup_fraction": 0.2, **train}
    return command_settings.TrainingSettings(
        **{"stage": "base", "seed": 3, "dtype": "float32", "compile": "off", "on_nonfinite": "stop"} | top,
        model=MODEL.resolved(),
        vocab_size=VOCAB,
        optimizer=config.Optimizer(),
        train=config.Base(**values),
    )


def make_trainer(
    folder: Path,
    steps: int = 12,
    loader: Any = None,
    micro_rows: int = ROWS,
    world: World | None = None,
    kind: type[Trainer] = Trainer,
    **settings: Any,
) -> Trainer:
    chosen = training_settings(**settings)
    model = GPT(GPTConfig.from_settings(chosen.model, VOCAB, LENGTH))
    model.init_weights(torch.Generator().manual_seed(chosen.seed))
    world = world or World(0, 1, torch.device("cpu"))
    model.to(world.device).compute_dtype = hardware.resolve_dtype(chosen.dtype, world.device)
    return kind(
        chosen,
        world,
        model,
        loader or PlainLoader(),
        PlainLoader(),
        np.ones(VOCAB, dtype=np.int64),
        steps,
        micro_rows,
        folder / "checkpoints",
        folder / "log.jsonl",
        "fingerprint",
        functools.partial(print, flush=True),
    )


def losses(folder: Path) -> dict[int, float]:
    """Loss of each step; the last line of a step counts."""
    return {line["step"]: line["loss"] for line in read_json_lines(folder / "log.jsonl")}


def weights_equal(one: GPT, other: GPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def files_equal(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_run(folder: Path, text_tokens: int = 40_000, steps: int = 30, **train: Any) -> dict[str, str]:
    """The inputs of the base stage in the formats of the data room; returns the arguments of `nanochat base`."""
    from nanochat.data.tokenizer import Tokenizer

    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    shards = []
    random = np.random.default_rng(0)
    for split, count in (("train", text_tokens), ("validation", 2_000)):
        ids = (np.cumsum(random.integers(1, 3, count)) % 200 + 20).astype("<u2")
        path = folder / "tokens" / f"{split}-00000.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids.tofile(path)
        np.save(folder / "tokens" / f"{split}-00000.idx.npy", np.zeros(1, dtype=np.int64))
        line = {"file": path.name, "split": split, "tokens": count, "documents": 1, "text_bytes": count}
        shards.append(line | {"size_bytes": path.stat().st_size, "sha256": sha256(path)})
    write_json(
        folder / "tokens" / "metrics.json",
        {
            "format": 1,
            "dtype": "uint16",
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "bos_id": tokenizer.bos_id,
            "shards": shards,
            "train_tokens": text_tokens,
            "validation_tokens": 2_000,
        },
    )
    settings = training_settings(steps=steps, **train)
    settings = settings.model_copy(update={"vocab_size": tokenizer.vocab_size})
    write_json(folder / "base.json", settings.model_dump(mode="json"))
    write_json(
        folder / "plan.json",
        {
            "device_batch_size": 4,
            "grad_accum_steps": 2,
            "tokens_per_step": ROWS * LENGTH,
            "sequence_length": LENGTH,
        },
    )
    return {
        "--config": str(folder / "base.json"),
        "--plan": str(folder / "plan.json"),
        "--tokens": str(folder / "tokens"),
        "--tokenizer": str(folder / "tokenizer"),
        "--checkpoints": str(folder / "base" / "checkpoints"),
        "--out": str(folder / "base"),
    }


def write_documents(folder: Path, documents: int) -> Path:
    """Token shards of that many short documents of random tokens; returns their folder."""
    random = np.random.default_rng(0)
    parts = [np.append(0, random.integers(1, VOCAB, random.integers(4, 2 * LENGTH))) for _ in range(documents)]
    ids = np.concatenate(parts).astype("<u2")
    folder = folder / "tokens"
    folder.mkdir()
    ids.tofile(folder / "train-00000.bin")
    np.save(folder / "train-00000.idx.npy", np.cumsum([0] + [len(part) for part in parts])[:-1])
    shard = {"file": "train-00000.bin", "split": "train", "tokens": len(ids), "documents": documents}
    shard |= {"text_bytes": len(ids), "size_bytes": 2 * len(ids), "sha256": sha256(folder / "train-00000.bin")}
    metrics = {"format": 1, "dtype": "uint16", "vocab_size": VOCAB, "tokenizer_sha256": "", "bos_id": 0}
    write_json(folder / "metrics.json", metrics | {"shards": [shard]})
    return folder


def start_base(arguments: dict[str, str], launcher: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """`nanochat base` as a process of its own."""
    flat = [part for pair in arguments.items() for part in pair]
    command = [sys.executable, *launcher, "-m", "nanochat", "base", *flat]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 90) -> None:
    """Until the condition holds, while the process lives."""
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def child_pids(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def metrics(arguments: dict[str, str]) -> dict[str, Any]:
    return json.loads((Path(arguments["--out"]) / "metrics.json").read_text())
