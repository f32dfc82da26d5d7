"""The conversations folder of a stage: encoded once, read by memory map."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanochat.errors import UserError
from nanochat.files import read_json, require_checksum, sha256, whole_file

SPLITS = ("train", "validation")


def write_split(folder: Path, split: str, encoded: Iterable[tuple[list[int], list[int]]], dtype: np.dtype) -> dict:
    """Write {split}.bin, .mask.npy and .idx.npy of (ids, mask) pairs; returns the lines for metrics.json."""
    # As arrays at once: lists of numbers take ten times their memory.
    pairs = [(np.array(ids, dtype), np.array(mask, np.uint8)) for ids, mask in encoded]
    ids, masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    starts = np.cumsum([0] + [len(part) for part in ids])[:-1].astype(np.int64)
    with whole_file(folder / f"{split}.bin") as temporary, open(temporary, "wb") as file:
        np.concatenate([np.empty(0, dtype), *ids]).tofile(file)
    for name, array in (("mask", np.concatenate([np.empty(0, np.uint8), *masks])), ("idx", starts)):
        with whole_file(folder / f"{split}.{name}.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    files = {}
    for name in (f"{split}.bin", f"{split}.mask.npy", f"{split}.idx.npy"):
        files[name] = {"size_bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    tokens = int(sum(map(len, ids)))
    return {
        "conversations": len(pairs),
        "tokens": tokens,
        "loss_tokens": int(sum(int(mask.sum()) for mask in masks)),
        "longest_tokens": max(map(len, ids), default=0),
        "files": files,
    }


class Conversations:
    """Encoded conversations of one split, with the mask of what the assistant says."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, starts: np.ndarray, metrics: dict):
        self.ids, self.mask, self.metrics = ids, mask, metrics
        self.bounds = np.append(starts, len(ids))  # (n + 1,)
        self.lengths = np.diff(self.bounds)  # (n,) tokens
        # Never a target, so any token does; <|bos|> is one that a model has seen at every start.
        self.pad_id: int = metrics["bos_id"]
        self.tokenizer_sha256: str = metrics["tokenizer_sha256"]

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "Conversations":
        """Checks sizes and checksums. UserError names the file."""
        folder = Path(folder)
        listed = folder / "metrics.json"
        metrics = read_json(listed)
        try:
            for name, line in metrics["splits"][split]["files"].items():
                require_checksum(folder / name, line["size_bytes"], line["sha256"], listed)
            dtype = np.dtype(metrics["dtype"])
        except (KeyError, TypeError):
            raise UserError(
                f"{listed}: not a list of encoded conversations. Remove it and run the stage again."
            ) from None
        path = folder / f"{split}.bin"
        # An empty file cannot be mapped.
        ids = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
        return cls(ids, np.load(folder / f"{split}.mask.npy"), np.load(folder / f"{split}.idx.npy"), metrics)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """ids and mask of one conversation, (n,) each, the first `limit` tokens."""
        start, stop = int(self.bounds[index]), int(self.bounds[index + 1])
        stop = min(stop, start + limit) if limit else stop
        return self.ids[start:stop], self.mask[start:stop]
