"""Schedule-free AdamW on the AdamW groups, Muon on the matrices: the baseline of the paper's Table 3.

The `schedulefree` package keeps two versions of the weights: call `train()` before training steps, and `eval()` before
evaluating or saving a model.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nanochat.common import need
from nanochat.optim import MuonAdamW

_COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")  # the package's state besides its tensors


class ScheduleFreeMuon:
    """Two optimizers as one: `groups` of kind "muon" go to `MuonAdamW`, those of kind "adamw" to `AdamWScheduleFree`.

    `lr`, `weight_decay`, `warmup_steps` and `betas` are for all schedule-free groups; the groups' own are not used.
    `param_groups` holds the Muon groups, whose lr, weight decay and momentum a schedule may set before every step.
    Gradients are averaged over ranks; the schedule-free state is the same on every rank.
    Raises ValueError unless both betas lie between 0 and 1.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        rank: int = 0,
        world_size: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),  # the package's
    ):
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"schedule-free betas {betas} must lie between 0 and 1")
        self.muon = MuonAdamW([g for g in groups if g["kind"] == "muon"], rank, world_size)
        self.params = [p for g in groups if g["kind"] == "adamw" for p in g["params"]]
        for p in self.params:  # the weights hold an average over steps, to which late steps add too little for bf16
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
        schedulefree = need("schedulefree", "a schedule-free run")
        self.free = schedulefree.AdamWScheduleFree(
            self.params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, warmup_steps=warmup_steps
        )
        self.world_size = world_size
        self.param_groups = self.muon.param_groups
        self.free.train()

    def train(self) -> None:
        self.free.train()

    def eval(self) -> None:
        self.free.eval()

    def step(self, closure=None):
        """One step of both optimizers; the package raises an exception unless it is in train mode."""
        loss = None if closure is None else closure()
        if self.world_size > 1:
            for p in self.params:
                dist.all_reduce(p.grad)
                p.grad.div_(self.world_size)
        self.free.step()
        self.muon.step()
        return loss

    def reducing(self):
        """As `MuonAdamW.reducing`, of the matrices."""
        return self.muon.reducing()

    def sent_gradients(self) -> list[torch.Tensor]:
        return self.muon.sent_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.free.zero_grad(set_to_none)
        self.muon.zero_grad(set_to_none)

    def free_state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Of the schedule-free part: its tensors by name, themselves, and its counters."""
        tensors = {f"{i}.{key}": t for i, p in enumerate(self.params) for key, t in self.free.state[p].items()}
        return tensors, {key: self.free.param_groups[0][key] for key in _COUNTERS}

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers; collective on several ranks. Taken in train mode, it resumes exactly."""
        tensors, counters = self.free_state()
        free = {name: t.clone() for name, t in tensors.items()}
        return {"muon": self.muon.state_dict(), "free": free, "counters": counters}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict()`. Raises ValueError when names or shapes differ."""
        expected = {f"{i}.{name}" for i in range(len(self.params)) for name in ("z", "exp_avg_sq")}
        if set(state["free"]) not in (expected, set()):  # empty: saved before the first step
            raise ValueError(f"schedule-free state holds {sorted(state['free'])}, not {sorted(expected)}")
        self.muon.load_state_dict(state["muon"])
        self.free.state.clear()
        for key, tensor in state["free"].items():
            index, name = key.split(".")
            p = self.params[int(index)]
            if tensor.shape != p.shape:
                raise ValueError(f"schedule-free state {key} has shape {tuple(tensor.shape)}, not {tuple(p.shape)}")
            self.free.state[p][name] = torch.empty_like(p).copy_(tensor)
        self.free.param_groups[0].update({k: state["counters"][k] for k in _COUNTERS})
