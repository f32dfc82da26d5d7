"""The batch-size plan of a stage: how a step's rows become micro-batches."""

from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.files import read_json


def rows_per_step(tokens_per_step: int, sequence_length: int, gpus: int, key: str) -> int:
    """Rows of a step over all ranks. Raises UserError, named by `key` (train.base), unless they split evenly."""
    whole = sequence_length * max(gpus, 1)
    if tokens_per_step % whole:
        below = tokens_per_step // whole * whole
        nearest = " or ".join(str(n) for n in (below, below + whole) if n)
        raise UserError(
            f"config.yaml: {key}.tokens_per_step = {tokens_per_step}: not a multiple of sequence_length x GPUs = "
            f"{sequence_length} x {max(gpus, 1)} = {whole}. Nearest: {nearest}."
        )
    return tokens_per_step // sequence_length


def read_plan(path: str | Path, tokens_per_step: int, sequence_length: int) -> dict[str, Any]:
    """The plan; UserError when it was made for other sizes."""
    plan = read_json(path)
    try:
        made_for = plan["tokens_per_step"], plan["sequence_length"], plan["device_batch_size"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a batch-size plan. Remove it and run the target `batch_size`.") from None
    if made_for[:2] != (tokens_per_step, sequence_length):
        raise UserError(
            f"{path}: made for tokens_per_step = {made_for[0]}, sequence_length = {made_for[1]}; the stage has "
            f"{tokens_per_step}, {sequence_length}. Run the target `batch_size` again."
        )
    return plan


def accumulation(rows: int, ranks: int, device_batch_size: int, path: str | Path) -> int:
    """Micro-batches a rank does in a step of `rows` rows; UserError when they do not divide it."""
    if rows % (ranks * device_batch_size):
        raise UserError(
            f"{path}: device_batch_size = {device_batch_size}: {rows} rows a step are no multiple of {ranks} ranks x "
            f"{device_batch_size}. Run the target `batch_size` again for this number of GPUs."
        )
    return rows // (ranks * device_batch_size)
