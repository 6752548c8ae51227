"""AdamW and Muon as pure functions, and MuonAdamW, the one optimizer class for 1 rank and N.

K members of a stack, R runs (batched models; absent for one), rows x cols = out x in of a matrix. Hyperparameters may be
floats, or tensors that broadcast (0-D so that a change never recompiles, (R,) for a rate per run).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

# Polar Express for 5 iterations, safety factor 2e-2, cushion 2 (Amsel et al., arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SHARD_MIN_NUMEL = 4096  # smaller AdamW tensors are updated by every rank: cheaper than gathering them
CACHE_ELEMENTS = 1 << 17  # matrix elements that a CPU updates at a time, so that a step's many passes stay in its cache


# -----------------------------------------------------------------------------
# the maths

def adamw_update(p, grad, exp_avg, exp_avg_sq, lr, weight_decay, beta1, beta2, eps, bias1, bias2) -> None:
    """One AdamW step with decoupled decay, in place (Loshchilov & Hutter). `bias1 = 1 - beta1^step`, likewise bias2."""
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    update = (exp_avg_sq / bias2).sqrt_().add_(eps).reciprocal_().mul_(exp_avg).mul_(lr / bias1)
    p.mul_(1 - lr * weight_decay).sub_(update)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: five Polar Express steps on the smaller Gram side.

    x (N, rows, cols) -> the same shape; singular values end near 1. bf16 on CUDA, the given dtype on CPU.
    """
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)                    # b A + c A A
        x = torch.baddbmm(x, *((x, poly) if tall else (poly, x)), beta=a)          # a X + (b A + c A A) X
    return x


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

    Each Muon group is one stack: its parameters become views into a (K, ..., rows, cols) tensor, so that a step neither
    gathers nor scatters them. With a leading run axis R the group's lr and weight_decay may be tensors of shape (R,).

    Over N ranks gradients are averaged, and work and state are sharded: Muon by stack members, large AdamW tensors by
    rows. The state dict is always that of one rank, so it loads at any world size.

    Raises ValueError for an unknown kind, a missing or repeated name, or a Muon group of mixed shapes.
    """

    def __init__(self, groups: list[dict], rank: int = 0, world_size: int = 1):
        super().__init__(groups, defaults={})
        self.rank, self.world_size = rank, world_size
        shards = {"adamw": _AdamWShard, "muon": _MuonShard}
        self._shards: list[_Shard] = []
        names = [group.get("name") for group in self.param_groups]
        for group, name in zip(self.param_groups, names):
            if group.get("kind") not in shards or name is None or names.count(name) > 1:
                raise ValueError(f"a param group needs a name of its own and a kind out of {sorted(shards)}")
            self._shards.append(shards[group["kind"]](group, rank, world_size))
        cuda = self.param_groups[0]["params"][0].is_cuda
        self._compiled = {name: torch.compile(f, dynamic=False, fullgraph=True) if cuda else f
                          for name, f in (("adamw", adamw_update), ("muon", muon_update))}

    @torch.no_grad()
    def step(self, closure=None):
        """Reduce, update and gather every group; communication of one group overlaps the work of the others."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for shard in self._shards:
            shard.reduce()
        for shard in self._shards:
            shard.wait()
            shard.steps += 1
            shard.update(self._compiled[shard.group["kind"]])
            shard.gather()
        for shard in self._shards:
            shard.wait()
        return loss

    def reset(self) -> None:
        """Forget everything but the parameters, as if newly made."""
        for shard in self._shards:
            shard.steps = 0
            for tensor in shard.state.values():
                tensor.zero_()

    def state_dict(self) -> dict:
        """`{group name: {tensor name: full tensor, "step": int}}`, independent of ranks; collective when N > 1."""
        return {shard.group["name"]: shard.state_dict() for shard in self._shards}

    def load_state_dict(self, state: dict) -> None:
        """Take over a `state_dict()` of any world size. Raises ValueError when groups, names or shapes differ."""
        if set(state) != {s.group["name"] for s in self._shards}:
            raise ValueError(f"optimizer state holds the groups {sorted(state)}, not {sorted(s.group['name'] for s in self._shards)}")
        for shard in self._shards:
            shard.load_state_dict(state[shard.group["name"]])


class _Shard:
    """The part of one param group that this rank updates, and how it talks to the other ranks.

    A subclass knows a state tensor's `_full_shape(name)`, all of it: `_full(name, part)`, its part: `_own(name, full)`.
    """

    def __init__(self, group: dict, rank: int, world_size: int):
        self.group, self.rank, self.world_size = group, rank, world_size
        self.steps = 0
        self.state: dict[str, torch.Tensor] = {}
        self._pending: list = []

    def wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def _hyper(self, name: str, like: torch.Tensor, trailing: int):
        """A hyperparameter as it enters the maths: (R,) with `trailing` unit axes, or a 0-D tensor if compiled."""
        value = self.group[name]
        if isinstance(value, torch.Tensor) and value.dim():
            dtype = torch.promote_types(like.dtype, torch.float32)  # a bf16 weight's rate is not rounded to bf16
            return value.to(like.device, dtype).view(-1, *(1,) * trailing)
        return torch.tensor(float(value), device=like.device) if like.is_cuda else float(value)

    def _all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        self._pending.append(gather(out, part, async_op=True))

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks, one after another."""
        if self.world_size == 1:
            return part
        out = part.new_empty(self.world_size * part.size(0), *part.shape[1:])
        self._all_gather(out, part)
        self.wait()
        return out

    def _reduce_scatter(self, out: torch.Tensor, full: torch.Tensor) -> None:
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        self._pending.append(scatter(out, full, async_op=True))

    def state_dict(self) -> dict:
        return {"step": self.steps, **{name: self._full(name, t).clone() for name, t in self.state.items()}}

    def load_state_dict(self, state: dict) -> None:
        if set(state) != {"step", *self.state}:
            raise ValueError(f"optimizer state of {self.group['name']} holds {sorted(state)}, not {sorted({'step', *self.state})}")
        for name, mine in self.state.items():
            found, expected = tuple(state[name].shape), tuple(self._full_shape(name))
            if found != expected:
                raise ValueError(f"optimizer state {self.group['name']}.{name} has shape {found}, not {expected}")
            mine.copy_(self._own(name, state[name]))
        self.steps = int(state["step"])


class _AdamWShard(_Shard):
    """Large tensors are split by rows of their first axis, small ones are updated by every rank."""

    def __init__(self, group, rank, world_size):
        super().__init__(group, rank, world_size)
        self.split = [world_size > 1 and p.numel() >= SHARD_MIN_NUMEL and p.size(0) % world_size == 0 for p in group["params"]]
        for i, p in enumerate(group["params"]):
            for kind in ("exp_avg", "exp_avg_sq"):  # fp32 even for a bf16 weight
                self.state[f"{kind}.{i}"] = torch.zeros_like(self._rows(i, p), dtype=torch.promote_types(p.dtype, torch.float32))

    def _rows(self, i: int, t: torch.Tensor) -> torch.Tensor:
        return t.chunk(self.world_size)[self.rank] if self.split[i] else t

    def _full_shape(self, name):
        return self.group["params"][int(name.split(".")[1])].shape

    def _full(self, name, part):
        return self._gathered(part) if self.split[int(name.split(".")[1])] else part

    def _own(self, name, full):
        return self._rows(int(name.split(".")[1]), full)

    def reduce(self) -> None:
        self._grads = [p.grad for p in self.group["params"]]
        if self.world_size == 1:
            return
        for i, grad in enumerate(self._grads):
            if self.split[i]:
                self._grads[i] = torch.empty_like(self._rows(i, grad))
                self._reduce_scatter(self._grads[i], grad)
            else:
                self._pending.append(dist.all_reduce(grad, async_op=True))

    def update(self, f) -> None:
        if self.world_size > 1:
            for grad in self._grads:
                grad.div_(self.world_size)
        rows = [self._rows(i, p) for i, p in enumerate(self.group["params"])]
        averages = [[self.state[f"{kind}.{i}"] for i in range(len(rows))] for kind in ("exp_avg", "exp_avg_sq")]
        if all(fits_one_pass(p, average) for p, average in zip(rows, averages[0])):
            return self._one_pass(rows, *averages)
        beta1, beta2 = self.group["betas"]
        bias = [1 - b ** self.steps for b in (beta1, beta2)]
        for p, *tensors in zip(rows, self._grads, *averages):
            correction = [torch.tensor(b, device=p.device) for b in bias] if p.is_cuda else bias
            f(p, *tensors, self._hyper("lr", p, p.dim() - 1), self._hyper("weight_decay", p, p.dim() - 1),
              beta1, beta2, self.group["eps"], *correction)

    def _one_pass(self, *tensors) -> None:
        """PyTorch's fused kernel: one sweep over memory where `adamw_update` takes ten. It takes one rate at a time."""
        params, exp_avgs, exp_avg_sqs = tensors
        values = [self.group["lr"], self.group["weight_decay"]]
        tensors = [params, [g.contiguous() for g in self._grads], exp_avgs, exp_avg_sqs]
        per_run = any(isinstance(v, torch.Tensor) and v.dim() for v in values)
        R = params[0].size(0)
        rates = [v.expand(R).tolist() if isinstance(v, torch.Tensor) else [v] * R for v in values] if per_run else [[float(v)] for v in values]
        for r, (lr, weight_decay) in enumerate(zip(*rates)):
            lists = [[t[r] for t in ts] for ts in tensors] if per_run else tensors
            steps = [torch.tensor(self.steps - 1.0) for _ in params]
            adamw(*lists, [], steps, fused=True, amsgrad=False, maximize=False, lr=lr, weight_decay=weight_decay,
                  beta1=self.group["betas"][0], beta2=self.group["betas"][1], eps=self.group["eps"])

    def gather(self) -> None:
        self._grads = None
        for i, p in enumerate(self.group["params"]):
            if self.split[i]:
                self._all_gather(p.data, self._rows(i, p.data).clone())


class _MuonShard(_Shard):
    """The stack is padded to a multiple of the ranks; each rank owns a run of its members."""

    def __init__(self, group, rank, world_size):
        super().__init__(group, rank, world_size)
        params = group["params"]
        if len({p.shape for p in params}) != 1:
            raise ValueError(f"Muon group {group['name']} mixes shapes {sorted({tuple(p.shape) for p in params})}")
        self.own = -(-len(params) // world_size)
        self.stack = params[0].new_zeros(self.own * world_size, *params[0].shape)  # (K padded, [R,] rows, cols)
        for p, member in zip(params, self.stack):
            member.copy_(p.data)
            p.data = member
        self.grads = torch.zeros_like(self.stack)
        *lead, rows, cols = self.own, *params[0].shape
        self.state["momentum_buffer"] = self.stack.new_zeros(*lead, rows, cols)
        self.state["second_momentum"] = self.stack.new_zeros(*lead, *((rows, 1) if rows >= cols else (1, cols)))

    def _mine(self, t: torch.Tensor) -> torch.Tensor:
        return t[self.rank * self.own:(self.rank + 1) * self.own]

    def _full_shape(self, name):
        return len(self.group["params"]), *self.state[name].shape[1:]

    def _full(self, name, part):
        return self._gathered(part)[:len(self.group["params"])]

    def _own(self, name, full):
        padded = full.new_zeros(self.own * self.world_size, *full.shape[1:])
        padded[:len(full)] = full
        return self._mine(padded)

    def reduce(self) -> None:
        params = self.group["params"]
        torch.stack([p.grad for p in params], out=self.grads[:len(params)])
        self._grad = self.grads
        if self.world_size > 1:
            self._grad = torch.empty_like(self._mine(self.grads))
            self._reduce_scatter(self._grad, self.grads)

    def update(self, f) -> None:
        if self.world_size > 1:
            self._grad.div_(self.world_size)
        mine = self._mine(self.stack)
        tensors = [t.flatten(0, -3) for t in (mine, self._grad, self.state["momentum_buffer"], self.state["second_momentum"])]
        for name in ("lr", "weight_decay"):
            value = self._hyper(name, mine, 2)
            per_run = isinstance(value, torch.Tensor) and value.dim()
            tensors.append(value.repeat(self.own, 1, 1) if per_run else value)  # (R, 1, 1) -> (own * R, 1, 1)
        momentum, beta2, n = self._hyper("momentum", mine, 2), self.group["beta2"], len(tensors[0])
        size = n if mine.is_cuda else max(1, CACHE_ELEMENTS // tensors[0][0].numel())
        for i in range(0, n, size):
            f(*(t[i:i + size] if isinstance(t, torch.Tensor) and t.dim() else t for t in tensors), momentum, beta2)

    def gather(self) -> None:
        self._grad = None
        if self.world_size > 1:
            self._all_gather(self.stack, self._mine(self.stack).clone())


def fits_one_pass(p, average):
    return p.device.type == "cpu" and p.dtype == average.dtype and p.is_contiguous()
