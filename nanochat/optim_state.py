"""The state of an optimizer over several ranks, kept by the rank that writes it only."""

from __future__ import annotations

import torch

from nanochat.optim import MuonAdamW
from nanochat.schedule_free import ScheduleFreeMuon


def state_to_write(optimizer: MuonAdamW | ScheduleFreeMuon, keep: bool) -> dict:
    """`optimizer.state_dict()` with its tensors on the CPU where `keep`; else {}, after the same communication.

    Collective: every rank takes part in gathering a tensor, and drops it before the next one unless it keeps it.
    """
    free = isinstance(optimizer, ScheduleFreeMuon)
    muon: dict[str, dict] = {}
    for shard in (optimizer.muon if free else optimizer)._shards:
        own = muon.setdefault(shard.group["name"], {"step": shard.steps})
        for name, part in shard.state.items():
            full = shard._full(name, part)
            if keep:
                own[name] = _on_cpu(full)
    if not keep:
        return {}
    if not free:
        return muon
    tensors, counters = optimizer.free_state()
    return {"muon": muon, "free": {name: _on_cpu(t) for name, t in tensors.items()}, "counters": counters}


def _on_cpu(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t)
