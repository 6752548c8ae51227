"""Schedule-free AdamW on the AdamW groups, Muon on the matrices: the baseline of the paper's Table 3.

Schedule-free AdamW (Defazio et al., arXiv 2405.15682) steps in fast weights z and evaluates their average x. The model
holds y = (1 - beta1) z + beta1 x in training, at which gradients are taken, and x after `eval()`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nanochat.common import need
from nanochat.optim import MuonAdamW

EPS = 1e-8


def schedule_free_update(y, z, exp_avg_sq, grads, lr, weight_decay, beta1, beta2, bias2, share) -> None:
    """One step of schedule-free AdamW in place, on lists of tensors of equal shapes; `grads` is left as it is.

    `bias2 = 1 - beta2^step`; `share`: of the new z in the average x. The decay acts at y (arXiv 2405.15682, algorithm 1
    with the preconditioner of Adam).
    """
    torch._foreach_mul_(exp_avg_sq, beta2)
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, value=1 - beta2)
    scale = torch._foreach_div(exp_avg_sq, bias2)
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, EPS)
    update = torch._foreach_div(grads, scale)
    if weight_decay:
        torch._foreach_add_(update, y, alpha=weight_decay)
    torch._foreach_lerp_(y, z, weight=share)  # x moves to the old z, and y with it
    torch._foreach_add_(y, update, alpha=lr * (beta1 * (1 - share) - 1))
    torch._foreach_sub_(z, update, alpha=lr)


class ScheduleFreeMuon:
    """Two optimizers as one: groups of kind "muon" go to `MuonAdamW`, those of kind "adamw" are schedule-free.

    `lr`, `weight_decay`, `warmup_steps` and `betas` are for all schedule-free groups; the groups' own are not used. The
    rate rises linearly over `warmup_steps`; a step's share in the average goes with the square of the highest rate yet.
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
        betas: tuple[float, float] = (0.9, 0.999),  # the authors'
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

    @torch.no_grad()
    def train(self) -> None:
        """Put y, at which gradients are taken, into the model."""
        self._move(1 - self.betas[0], train_mode=True)

    @torch.no_grad()
    def eval(self) -> None:
        """Put x, the average, into the model."""
        self._move(1 - 1 / self.betas[0], train_mode=False)

    def _move(self, weight: float, train_mode: bool) -> None:
        if self.counters["train_mode"] != train_mode:
            for p, z in zip(self.params, self.z):
                p.lerp_(z, weight)
            self.counters["train_mode"] = train_mode

    def step(self, closure=None):
        """One step of both optimizers. Raises RuntimeError unless the model holds y."""
        if not self.counters["train_mode"]:
            raise RuntimeError("schedule-free: the optimizer is not in train mode; call train() before a step")
        loss = None if closure is None else closure()
        if self.world_size > 1:
            for p in self.params:
                dist.all_reduce(p.grad)
                p.grad.div_(self.world_size)
        self._free_step()
        self.muon.step()
        return loss

    @torch.no_grad()
    def _free_step(self) -> None:
        if not self.z:
            self.z = [p.detach().clone() for p in self.params]
            self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        c, (beta1, beta2) = self.counters, self.betas
        lr = self.lr * ((c["k"] + 1) / self.warmup_steps if c["k"] < self.warmup_steps else 1.0)
        c["lr_max"] = max(lr, c["lr_max"])
        weight = c["lr_max"] ** 2.0
        c["weight_sum"] += weight
        share = weight / c["weight_sum"] if c["weight_sum"] else 0.0
        tensors = [p.data for p in self.params], self.z, self.exp_avg_sq, [p.grad for p in self.params]
        bias2 = 1 - beta2 ** (c["k"] + 1)
        schedule_free_update(*tensors, lr, self.weight_decay, beta1, beta2, bias2, share)
        c["k"] += 1

    def reducing(self):
        """As `MuonAdamW.reducing`, of the matrices."""
        return self.muon.reducing()

    def sent_gradients(self) -> list[torch.Tensor]:
        return self.muon.sent_gradients()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.params:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()
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

    def free_state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """(tensors, numbers) of the schedule-free part, not copied."""
        lists = {"z": self.z, "exp_avg_sq": self.exp_avg_sq}
        return {f"{i}.{name}": t for name, ts in lists.items() for i, t in enumerate(ts)}, dict(self.counters)

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict()`. Raises ValueError when names or shapes differ."""
        expected = {f"{i}.{name}" for i in range(len(self.params)) for name in ("z", "exp_avg_sq")}
        if set(state["free"]) not in (expected, set()):  # empty: saved before the first step
            raise ValueError(f"schedule-free state holds {sorted(state['free'])}, not {sorted(expected)}")
        for key, tensor in state["free"].items():
            p = self.params[int(key.split(".")[0])]
            if tensor.shape != p.shape:
                raise ValueError(f"schedule-free state {key} has shape {tuple(tensor.shape)}, not {tuple(p.shape)}")
        self.muon.load_state_dict(state["muon"])
        for name in ("z", "exp_avg_sq"):
            saved = [state["free"][f"{i}.{name}"] for i in range(len(self.params))] if state["free"] else []
            setattr(self, name, [torch.empty_like(p).copy_(t) for p, t in zip(self.params, saved)])
        self.counters = {name: type(mine)(state["counters"][name]) for name, mine in self.counters.items()}
