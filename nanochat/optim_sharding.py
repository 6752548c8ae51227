"""How a param group is updated on one rank or several: which part a rank owns, and how gradients and weights are sent.

K members of a stack, R runs of a batched model (absent for one model), rows x cols = out x in of a matrix.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

SHARD_MIN_NUMEL = 4096  # smaller AdamW tensors are updated by every rank, which is cheaper than gathering them
CACHE_ELEMENTS = 1 << 17  # matrix elements that a CPU updates at a time, so that they stay in its cache


def _has_axes(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _scalar(value, like: torch.Tensor):
    """A float, or for an update on CUDA a 0-D CPU tensor, which is an argument of the compiled kernels.

    So a change neither recompiles, nor launches anything, nor waits for the device. A tensor stays where it is.
    """
    if not like.is_cuda:
        return float(value)
    return value if isinstance(value, torch.Tensor) else torch.tensor(float(value))


class Shard:
    """The part of one param group that this rank updates, and its communication with the other ranks.

    A subclass defines, for a state tensor: `_full_shape(name)`; `_full(name, part)`, the whole of it from the parts of
    all ranks; `_own(name, full)`, this rank's part.
    """

    def __init__(self, group: dict, rank: int, world_size: int):
        self.group, self.rank, self.world_size = group, rank, world_size
        self.steps = 0
        self.state: dict[str, torch.Tensor] = {}
        self.reduced = False  # since the last update
        self._pending: list = []

    def wait(self) -> None:
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def reduce_once(self) -> None:
        """`reduce`, unless the backward pass has done it (`MuonAdamW.reducing`)."""
        if not self.reduced:
            self.reduce()
            self.reduced = True

    def _average_op(self) -> tuple[dist.ReduceOp.RedOpType, int]:
        """How gradients are added up over the ranks, and what the sum must be divided by: gloo has no average."""
        if dist.get_backend() == "nccl":
            return dist.ReduceOp.AVG, 1
        return dist.ReduceOp.SUM, self.world_size

    def _hyper(self, value, like: torch.Tensor, trailing: int):
        """A hyperparameter's value for an update: (R,) with `trailing` axes of 1 added, else as in `_scalar`."""
        if _has_axes(value):
            dtype = torch.promote_types(like.dtype, torch.float32)  # rates are not rounded to bf16
            return value.to(like.device, dtype).view(-1, *(1,) * trailing)
        return _scalar(value, like)

    def _all_gather(self, out: torch.Tensor, part: torch.Tensor) -> None:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        self._pending.append(gather(out, part, async_op=True))

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks, concatenated."""
        if self.world_size == 1:
            return part
        out = part.new_empty(self.world_size * part.size(0), *part.shape[1:])
        self._all_gather(out, part)
        self.wait()
        return out

    def _reduce_scatter(self, out: torch.Tensor, full: torch.Tensor) -> None:
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        self._pending.append(scatter(out, full, op=self._average_op()[0], async_op=True))

    def _divide(self, *sums: torch.Tensor) -> None:
        """Make the sums of `reduce` averages, where they are not."""
        if self.world_size > 1 and (n := self._average_op()[1]) > 1:
            for total in sums:
                total.div_(n)

    def state_dict(self) -> dict:
        return {"step": self.steps, **{name: self._full(name, t).clone() for name, t in self.state.items()}}

    def load_state_dict(self, state: dict) -> None:
        if set(state) != {"step", *self.state}:
            raise ValueError(
                f"optimizer state of {self.group['name']} holds {sorted(state)}, not {sorted({'step', *self.state})}"
            )
        for name, mine in self.state.items():
            found, expected = tuple(state[name].shape), tuple(self._full_shape(name))
            if found != expected:
                raise ValueError(f"optimizer state {self.group['name']}.{name} has shape {found}, not {expected}")
            mine.copy_(self._own(name, state[name]))
        self.steps = int(state["step"])


class AdamWShard(Shard):
    """Large tensors are split along their first axis; small ones are updated by every rank."""

    def __init__(self, group, rank, world_size):
        super().__init__(group, rank, world_size)
        self.split = [
            world_size > 1 and p.numel() >= SHARD_MIN_NUMEL and p.size(0) % world_size == 0 for p in group["params"]
        ]
        for i, p in enumerate(group["params"]):
            for kind in ("exp_avg", "exp_avg_sq"):  # fp32 even for a bf16 weight
                self.state[f"{kind}.{i}"] = torch.zeros_like(
                    self._rows(i, p), dtype=torch.promote_types(p.dtype, torch.float32)
                )

    def _rows(self, i: int, t: torch.Tensor) -> torch.Tensor:
        return t.chunk(self.world_size)[self.rank] if self.split[i] else t

    def _full_shape(self, name):
        return self.group["params"][int(name.split(".")[1])].shape

    def _full(self, name, part):
        return self._gathered(part) if self.split[int(name.split(".")[1])] else part

    def _own(self, name, full):
        return self._rows(int(name.split(".")[1]), full)

    def keeps_gradients(self) -> bool:
        return all(self.split)

    def reduced_gradients(self) -> list[torch.Tensor]:
        return self._grads

    def reduce(self) -> None:
        self._grads = [p.grad for p in self.group["params"]]
        if self.world_size == 1:
            return
        for i, grad in enumerate(self._grads):
            if self.split[i]:
                self._grads[i] = torch.empty_like(self._rows(i, grad))
                self._reduce_scatter(self._grads[i], grad)
            else:
                self._pending.append(dist.all_reduce(grad, op=self._average_op()[0], async_op=True))

    def update(self, f) -> None:
        self._divide(*self._grads)
        params = [self._rows(i, p) for i, p in enumerate(self.group["params"])]
        averages = [[self.state[f"{kind}.{i}"] for i in range(len(params))] for kind in ("exp_avg", "exp_avg_sq")]
        if all(
            p.device.type == "cpu" and p.dtype == a.dtype and p.is_contiguous() for p, a in zip(params, averages[0])
        ):
            return self._one_pass(params, self._grads, *averages)
        for p, *rest in zip(params, self._grads, *averages):
            rates = [self._hyper(self.group[name], p, p.dim() - 1) for name in ("lr", "weight_decay")]
            betas = [self._hyper(b, p, p.dim() - 1) if _has_axes(b) else b for b in self.group["betas"]]
            bias = [self._hyper(1 - b**self.steps, p, p.dim() - 1) for b in self.group["betas"]]
            f(p, *rest, *rates, *betas, self.group["eps"], *bias)

    def _one_pass(self, params, grads, *averages) -> None:
        """`adamw_update` by PyTorch's fused CPU kernel, one pass over memory. It takes floats: with R runs, R calls."""
        tensors = [params, [g.contiguous() for g in grads], *averages]
        values = self.group["lr"], self.group["weight_decay"], *self.group["betas"]
        values = torch.stack(torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in values)))
        parts = [tensors] if values.dim() == 1 else zip(*(zip(*(t.unbind() for t in ts)) for ts in tensors))
        steps = [torch.tensor(float(self.steps))] * len(params)
        for part, (lr, weight_decay, beta1, beta2) in zip(parts, values.view(4, -1).T.tolist(), strict=True):
            torch._fused_adamw_(
                *part,
                [],
                steps,
                amsgrad=False,
                maximize=False,
                lr=lr,
                weight_decay=weight_decay,
                beta1=beta1,
                beta2=beta2,
                eps=self.group["eps"],
            )

    def gather(self) -> None:
        self._grads = None
        for i, p in enumerate(self.group["params"]):
            if self.split[i]:
                self._all_gather(p.data, self._rows(i, p.data).clone())


class MuonShard(Shard):
    """The stack is padded to a multiple of the world size; each rank owns a block of consecutive members."""

    def __init__(self, group, rank, world_size):
        super().__init__(group, rank, world_size)
        params = group["params"]
        if len({p.shape for p in params}) != 1:
            raise ValueError(f"Muon group {group['name']} mixes shapes {sorted({tuple(p.shape) for p in params})}")
        self.own = -(-len(params) // world_size)
        self.stack = params[0].new_zeros(self.own * world_size, *params[0].shape)  # (padded K, [R,] rows, cols)
        for p, member in zip(params, self.stack):
            member.copy_(p.data)
            p.data = member
        self.grads = torch.zeros_like(self.stack)
        *lead, rows, cols = self.own, *params[0].shape
        self.state["momentum_buffer"] = self.stack.new_zeros(*lead, rows, cols)
        self.state["second_momentum"] = self.stack.new_zeros(*lead, *((rows, 1) if rows >= cols else (1, cols)))

    def _mine(self, t: torch.Tensor) -> torch.Tensor:
        return t[self.rank * self.own : (self.rank + 1) * self.own]

    def _full_shape(self, name):
        return len(self.group["params"]), *self.state[name].shape[1:]

    def _full(self, name, part):
        return self._gathered(part)[: len(self.group["params"])]

    def _own(self, name, full):
        padded = full.new_zeros(self.own * self.world_size, *full.shape[1:])
        padded[: len(full)] = full
        return self._mine(padded)

    def keeps_gradients(self) -> bool:
        return True

    def reduced_gradients(self) -> list[torch.Tensor]:
        return [self._grad]

    def reduce(self) -> None:
        params = self.group["params"]
        torch.stack([p.grad for p in params], out=self.grads[: len(params)])
        self._grad = self.grads
        if self.world_size > 1:
            self._grad = torch.empty_like(self._mine(self.grads))
            self._reduce_scatter(self._grad, self.grads)

    def update(self, f) -> None:
        self._divide(self._grad)
        mine = self._mine(self.stack)
        tensors = [mine, self._grad, self.state["momentum_buffer"], self.state["second_momentum"]]
        tensors = [t.flatten(0, -3) for t in tensors]  # (own, [R,] ...) -> (own * R, ...)
        for name in ("lr", "weight_decay", "momentum"):
            value = self._hyper(self.group[name], mine, 2)
            tensors.append(value.repeat(self.own, 1, 1) if _has_axes(value) else value)
        n = len(tensors[0])
        size = n if mine.is_cuda else max(1, CACHE_ELEMENTS // tensors[0][0].numel())
        for i in range(0, n, size):
            f(*(t[i : i + size] if _has_axes(t) else t for t in tensors), self.group["beta2"])

    def gather(self) -> None:
        self._grad = None
        if self.world_size > 1:
            self._all_gather(self.stack, self._mine(self.stack).clone())
