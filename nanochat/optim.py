"""AdamW and Muon as pure functions, and MuonAdamW, an optimizer of both for one rank or several.

K members of a stack, R runs of a batched model (absent for one model), rows x cols = out x in of a matrix.
Hyperparameters are floats or tensors that broadcast: 0-D, so that a change never recompiles, or one value per run (R,).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch

from nanochat.optim_sharding import AdamWShard, MuonShard, Shard

# Polar Express for 5 iterations, safety factor 2e-2, cushion 2 (Amsel et al., arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# -----------------------------------------------------------------------------
# updates


def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, beta1, beta2, eps, bias1, bias2) -> None:
    """One AdamW step with decoupled weight decay, in place (Loshchilov & Hutter, arXiv 1711.05101).

    p, grad, exp_avg and exp_avg_sq have the same shape; `bias1 = 1 - beta1^step`, `bias2 = 1 - beta2^step`.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    update = (exp_avg_sq / bias2).sqrt_().add_(eps).reciprocal_().mul_(exp_avg).mul_(lr / bias1)
    p.mul_(1 - lr * weight_decay).sub_(update)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices: five Polar Express steps, on the smaller Gram matrix.

    x (N, rows, cols) -> the same shape, with singular values near 1. In bf16 on CUDA, in the given dtype on a CPU.
    """
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)

    if x.element_size() >= 4 and max(x.shape[-2:]) >= 2 * min(x.shape[-2:]):
        for steps in POLAR_EXPRESS[:2], POLAR_EXPRESS[2:]:
            product = gram_product(_gram(x, tall), steps)
            x = torch.bmm(x, product) if tall else torch.bmm(product, x)
        return x
    for a, b, c in POLAR_EXPRESS:
        gram = _gram(x, tall)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A A
        x = torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a)  # a X + (b A + c A A) X
    return x


def _gram(x: torch.Tensor, tall: bool) -> torch.Tensor:
    return torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)


def gram_product(gram: torch.Tensor, steps) -> torch.Tensor:
    """The product of several Polar Express steps, from the Gram matrix of X alone: (N, n, n) -> the same shape.

    With P = a I + b A + c A A, a step turns X into P X and its Gram matrix A into P A P. For long X this is a third
    less work than multiplying X in every step. Rounding errors grow with the number of steps, so it is used in fp32 or
    wider only, and the Gram matrix is computed again after two steps.
    """
    product = None
    for i, (a, b, c) in enumerate(steps):
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        product = poly if product is None else torch.bmm(poly, product)
        if i + 1 < len(steps):
            gram = torch.bmm(torch.bmm(poly, gram), poly)
    return product


def muon_update(p, grad, momentum_buffer, second_momentum, lr, weight_decay, momentum, beta2) -> None:
    """One Muon step on a stack of same-shape matrices, in place; `grad` is used as scratch.

    p, grad, momentum_buffer (N, rows, cols); second_momentum (N, rows, 1) if rows >= cols, else (N, 1, cols); lr and
    weight_decay floats or (N, 1, 1). Nesterov momentum as an EMA; orthogonalisation; NorMuon-style variance reduction
    that keeps each member's norm; decay only where update and parameter agree in sign; both scaled by
    sqrt(max(1, rows / cols)).
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = orthogonalize(grad.lerp_(momentum_buffer, momentum)).to(grad.dtype)

    axis = -1 if second_momentum.size(-1) == 1 else -2
    variance = update.square().mean(axis, keepdim=True)
    norm = variance.sum((-2, -1), keepdim=True).sqrt()
    second_momentum.lerp_(variance, 1 - beta2)
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    new_norm = (variance * scale.square()).sum((-2, -1), keepdim=True).sqrt()
    update.mul_(scale * (norm / new_norm.clamp_min(1e-10)))

    lr = lr * max(1.0, p.size(-2) / p.size(-1)) ** 0.5
    agree = (update * p).ge_(0)  # 1 or 0
    p.sub_(update.add_(agree.mul_(p).mul_(weight_decay)).mul_(lr))


# -----------------------------------------------------------------------------
# the optimizer


class MuonAdamW(torch.optim.Optimizer):
    """Groups with `kind` "adamw" (lr, betas, eps, weight_decay) or "muon" (lr, momentum, beta2, weight_decay).

    Each Muon group is one stack: its parameters become views into a (K, ..., rows, cols) tensor, so that a step does
    not copy them. A group's lr and weight_decay are read at every step: floats or 0-D tensors, or tensors (R,) where
    the parameters have a leading run axis R. Tensors may be filled in place between steps.

    Over several ranks, gradients are averaged, and work and state are sharded: Muon by members of the stack, large
    AdamW tensors by rows. The state dict is the one of a single rank, so it loads at any world size.

    Raises ValueError for an unknown kind, a missing or repeated name, or a Muon group of mixed shapes.
    """

    def __init__(self, groups: list[dict], rank: int = 0, world_size: int = 1):
        super().__init__(groups, defaults={})
        self.rank, self.world_size = rank, world_size
        shards = {"adamw": AdamWShard, "muon": MuonShard}
        self._shards: list[Shard] = []
        names = [group.get("name") for group in self.param_groups]
        for group, name in zip(self.param_groups, names):
            if group.get("kind") not in shards or name is None or names.count(name) > 1:
                raise ValueError(f"each param group needs a name of its own and a kind from {sorted(shards)}")
            self._shards.append(shards[group["kind"]](group, rank, world_size))
        cuda = self.param_groups[0]["params"][0].is_cuda
        self._compiled = {
            name: torch.compile(f, dynamic=False, fullgraph=True) if cuda else f
            for name, f in (("adamw", adamw_update), ("muon", muon_update))
        }

    @contextlib.contextmanager
    def reducing(self) -> Iterator[None]:
        """Around the last backward pass of a step: a group's gradients are sent as soon as all of them are there.

        What was sent is waited for at the end, and `step` does not send it again; the gradients of this rank stay in
        `.grad`. Small tensors, which are averaged in place, wait for `step`. On one rank this does nothing.
        """
        missing = {s: len(s.group["params"]) for s in self._shards if self.world_size > 1 and s.keeps_gradients()}

        def arrived(shard: Shard, _) -> None:
            missing[shard] -= 1
            if missing[shard] == 0:
                shard.reduce_once()

        hooks = [p.register_post_accumulate_grad_hook(partial(arrived, s)) for s in missing for p in s.group["params"]]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for shard in missing:
                shard.wait()

    def sent_gradients(self) -> list[torch.Tensor]:
        """What has come back of the gradients sent so far, themselves: `step` uses these, and not those in `.grad`."""
        return [gradient for shard in self._shards if shard.reduced for gradient in shard.received()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what was sent of an update that was not taken."""
        for shard in self._shards:
            shard.reduced = False
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        """Reduce, update and gather every group; the communication of one group overlaps the work on the others."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for shard in self._shards:
            shard.reduce_once()
        for shard in self._shards:
            shard.wait()
            shard.steps += 1
            shard.reduced = False
            shard.update(self._compiled[shard.group["kind"]])
            shard.gather()
        for shard in self._shards:
            shard.wait()
        return loss

    def reset(self) -> None:
        """Set the state to that of a new optimizer; the parameters stay as they are."""
        for shard in self._shards:
            shard.steps = 0
            for tensor in shard.state.values():
                tensor.zero_()

    def run_states(self) -> list[tuple[torch.Tensor, int]]:
        """The state tensors of a batched model on one rank, each with the number of its run axis R."""
        return [(t, 0 if shard.group["kind"] == "adamw" else 1) for shard in self._shards for t in shard.state.values()]

    def param_state(self, group: dict) -> list[dict[str, torch.Tensor]]:
        """The state of a group's parameters on one rank, a dict each, under the names of torch's own optimizers.

        Each tensor has its parameter's shape and is a view into the state: for whoever watches the optimizer.
        """
        shard = next(shard for shard in self._shards if shard.group is group)
        count = range(len(group["params"]))
        if group["kind"] == "muon":
            return [{"momentum_buffer": shard.state["momentum_buffer"][i]} for i in count]
        return [{name: shard.state[f"{name}.{i}"] for name in ("exp_avg", "exp_avg_sq")} for i in count]

    def state_dict(self) -> dict:
        """`{group name: {tensor name: full tensor, "step": int}}`, alike on all ranks; collective on several ranks."""
        return {shard.group["name"]: shard.state_dict() for shard in self._shards}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict()` of any world size. Raises ValueError when groups, names or shapes differ."""
        if set(state) != {s.group["name"] for s in self._shards}:
            raise ValueError(
                f"optimizer state holds the groups {sorted(state)}, not {sorted(s.group['name'] for s in self._shards)}"
            )
        for shard in self._shards:
            shard.load_state_dict(state[shard.group["name"]])
