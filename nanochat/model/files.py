"""A model on disk: `model.safetensors` and `config.json` in one folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.errors import UserError
from nanochat.files import read_json, sha256, whole_file, write_json
from nanochat.model.gpt import GPT, GPTConfig

FORMAT = 1


def save_model(folder: str | Path, model: GPT, extra: dict[str, Any]) -> None:
    """Write the weights as they are (float32 after training) and config.json.

    extra  stands in config.json beside the sizes: tokenizer_sha256, stage, step
    """
    folder = Path(folder)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    # The checksum joins the two files: weights of one attempt are never read with the sizes of another.
    config = {"format": FORMAT, "model": dataclasses.asdict(model.config), **extra}
    write_json(folder / "config.json", config | {"weights_sha256": sha256(folder / "model.safetensors")})


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json: {format, model: sizes, tokenizer_sha256, stage, step, weights_sha256}."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{path}: format = {config.get('format') if isinstance(config, dict) else None}: must be {FORMAT}."
        )
    return config


def load_model(
    folder: str | Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    tokenizer_sha256: str | None = None,
    sequence_length: int | None = None,
) -> GPT:
    """Read a model that `save_model` wrote.

    dtype            of weights and products; None: float32 weights, products in float32 (training sets `compute_dtype`)
    tokenizer_sha256 of the tokenizer that will be used with it; another than it was trained with is a UserError
    sequence_length  instead of the one it was trained with
    """
    folder, config = Path(folder), read_config(folder)
    if tokenizer_sha256 is not None and config.get("tokenizer_sha256") != tokenizer_sha256:
        raise UserError(
            f"{folder}: trained with the tokenizer {str(config.get('tokenizer_sha256'))[:12]}, but the given one is "
            f"{tokenizer_sha256[:12]}: it belongs to another run. Give the results of one run."
        )
    try:
        sizes = GPTConfig(**config["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: model: {error}. It must hold the sizes of a model.") from None
    path = folder / "model.safetensors"
    if path.exists() and sha256(path) != config.get("weights_sha256"):
        raise UserError(f"{path}: its sha256 is not the one in {folder / 'config.json'}. Run its stage again.")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error}). Remove it and run its stage again.") from None
    if sequence_length is not None:
        sizes = sizes.with_sequence_length(sequence_length)
    model = GPT(sizes)
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"{path}: not the weights that {folder / 'config.json'} describes. Are both from one run?"
        ) from None
    model.compute_dtype = dtype or torch.float32
    # The rotary table stays float32: at position 2,000 a bfloat16 angle would be off by several radians.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device=device, dtype=dtype)
    return model.to(device)
