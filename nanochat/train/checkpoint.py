"""Checkpoints that are whole or absent: everything a run needs to go on as if it had not stopped.

checkpoints/step-00000120/
  model.safetensors      float32 weights
  optimizer.safetensors  its state by parameter name
  state.json             {format, step, fingerprint, ..., files: {name: {size_bytes, sha256}}}

Written under a temporary name, flushed to disk, then renamed: a kill leaves no half-written folder under a final name. A disk
can still damage one, so a checkpoint counts only when its checksums match; a damaged one is named and the one before taken.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.errors import UserError
from nanochat.files import require_checksum, sha256, sync, unique_suffix, write_json

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class AttemptSuperseded(Exception):
    """A newer attempt of this job runs elsewhere: this process must write nothing more."""


@dataclass(frozen=True)
class Checkpoint:
    """A valid one. `state` is what was given to `save`, plus format, step, fingerprint and files."""

    folder: Path
    step: int
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        return load_file(self.folder / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.folder / OPTIMIZER)


def save(
    checkpoints: str | Path,
    step: int,
    fingerprint: str,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` finished steps, then drop all but the newest `keep` of the same fingerprint.

    fingerprint  of all that decides the result: settings and inputs. Checkpoints of another are never read, nor removed here
    raises       AttemptSuperseded when this attempt is not the newest one
    """
    checkpoints = Path(checkpoints)
    require_newest_attempt()
    checkpoints.mkdir(parents=True, exist_ok=True)
    for leftover in checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = _folder(checkpoints, step, fingerprint)
    temporary = checkpoints / f".{final.name}.{unique_suffix()}.tmp"
    try:
        _write(temporary, step, fingerprint, {MODEL: model, OPTIMIZER: optimizer}, state)
        # Writing took time; another attempt may have begun meanwhile.
        require_newest_attempt()
    except BaseException:
        # On a full disk above all, half a checkpoint must not stay.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        # The same step was saved before (damaged, or by an earlier attempt). A folder cannot replace a full one at once.
        final.rename(checkpoints / f".{final.name}.{unique_suffix()}.old.tmp")
    temporary.rename(final)
    sync(checkpoints)
    for leftover in checkpoints.glob(".step-*.old.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    prune(checkpoints, fingerprint, keep, step)
    return final


def _folder(checkpoints: Path, step: int, fingerprint: str) -> Path:
    """step-00000120; with a part of the fingerprint behind it where other settings have a checkpoint of that step."""
    folder = checkpoints / f"step-{step:08}"
    with contextlib.suppress(OSError, UserError, KeyError, TypeError):
        if _state(folder)["fingerprint"] != fingerprint:
            return checkpoints / f"{folder.name}-{fingerprint[:8]}"
    return folder


def _write(folder: Path, step: int, fingerprint: str, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """All files of a checkpoint, flushed to disk. tensors  by file name"""
    folder.mkdir()
    files = {}
    for name, content in tensors.items():
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in content.items()}, folder / name)
        files[name] = {"size_bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write_json(folder / STATE, {"format": FORMAT, "step": step, "fingerprint": fingerprint, **state, "files": files})
    for path in (*folder.iterdir(), folder):
        sync(path)


def newest_valid(checkpoints: str | Path, fingerprint: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole and of this fingerprint; None without one.

    say  is told of each damaged one that is passed over, with its path and what is wrong with it
    """
    for folder in sorted(Path(checkpoints).glob("step-*"), reverse=True):
        try:
            state = _state(folder)
            if state["fingerprint"] != fingerprint:
                continue
            for name in (MODEL, OPTIMIZER):
                entry = state["files"][name]
                require_checksum(folder / name, entry["size_bytes"], entry["sha256"], folder / STATE)
            return Checkpoint(folder, state["step"], state)
        except OSError as error:
            say(f"skipping the checkpoint {folder.name}, which cannot be read: {error}")
        except (UserError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{folder / STATE}: no {error}"
            say(f"skipping the damaged checkpoint {folder.name}: {reason.split(' Remove ')[0]}")
    return None


def prune(checkpoints: str | Path, fingerprint: str, keep: int, newest: int) -> None:
    """Remove all but the newest `keep` of this fingerprint up to step `newest`; those of other settings, and damaged ones, stay.

    newest  the step just saved: one above it was damaged, or training would have gone on from there, and takes no place
    """
    own = []
    for folder in sorted(Path(checkpoints).glob("step-*"), reverse=True):
        with contextlib.suppress(UserError, KeyError, TypeError):
            state = _state(folder)
            if state["fingerprint"] == fingerprint and state["step"] <= newest:
                own.append(folder)
    for folder in own[keep:]:
        _remove(folder)


def require_newest_attempt() -> None:
    """Raise AttemptSuperseded unless the newest attempt of this job is this one.

    A node that lost only its SLURM daemon goes on writing while the job runs elsewhere. Each attempt therefore gets a token in
    ATTEMPT_TOKEN, and writes it to the file ATTEMPT_TOKEN_FILE when it starts: the newest stands there. Without these
    variables (a stage run by hand) nothing is checked.
    """
    token, path = os.environ.get("ATTEMPT_TOKEN"), os.environ.get("ATTEMPT_TOKEN_FILE")
    if not token or not path:
        return
    with contextlib.suppress(FileNotFoundError):
        newest = Path(path).read_text().strip()
        if newest and newest != token:
            raise AttemptSuperseded(f"{path} names attempt {newest}, this is {token}")


def _state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {'missing' if isinstance(error, FileNotFoundError) else 'not readable'}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not the state of a checkpoint of format {FORMAT}")
    return state


def _remove(folder: Path) -> None:
    """Under a temporary name first: a kill in the middle must not leave a half-removed checkpoint."""
    hidden = folder.parent / f".{folder.name}.{unique_suffix()}.old.tmp"
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
