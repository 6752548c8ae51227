"""Bits per byte: a loss that can be compared between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist


@torch.no_grad()
def bits_per_byte(
    model, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], token_bytes: torch.Tensor, world_size: int = 1
) -> float | list[float]:
    """Total nats / (ln 2 x total bytes of the target tokens); special tokens, which have 0 bytes, are left out of both.

    `batches` yields (inputs, targets), each (B, T); `token_bytes` (V,) is the number of bytes of each token. A batched
    model of R runs gives a list of R values. Sums over all ranks when `world_size` > 1. Raises ValueError if no target
    token has bytes.
    """
    runs = model.runs or 1
    nats = torch.zeros(runs, dtype=torch.float64, device=token_bytes.device)
    total_bytes = torch.zeros(1, dtype=torch.float64, device=token_bytes.device)
    for inputs, targets in batches:
        losses = model(inputs, targets, loss_reduction="none").view(runs, -1)  # (R, B*T)
        counted = token_bytes[targets.flatten().clamp_min(0)] * (targets.flatten() >= 0)
        nats += torch.where(counted > 0, losses, 0.0).double().sum(-1)
        total_bytes += counted.sum()
    if world_size > 1:
        dist.all_reduce(nats)
        dist.all_reduce(total_bytes)
    if not total_bytes.item():
        raise ValueError("no target token has bytes: the batches hold special tokens only")
    bpb = (nats / (math.log(2) * total_bytes)).tolist()
    return bpb[0] if model.runs is None else bpb
