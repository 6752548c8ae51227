"""A finished model's weights in one .safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch

from nanochat.common import UserError


def save_weights(path: Path, weights: dict[str, torch.Tensor], description: dict) -> None:
    """Write the weights atomically, with `description` as JSON in the file's metadata; raises `UserError` if there is no room."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
    try:
        safetensors.torch.save_file(tensors, temporary, metadata={"description": json.dumps(description)})
    except safetensors.SafetensorError as e:
        raise UserError(
            f"{path} cannot be written ({e}); make room, then run the same command again with --resume auto"
        ) from None
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)
