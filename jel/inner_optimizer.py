"""LHOPT's inner optimizer: an adaptive step whose every hyperparameter may change at any moment.

The published code of "A Generalizable Approach to Learning Optimizers" (arXiv 2106.00958) trains with it; this is our
own writing of the parts that its example configuration switches on. Each of them can be switched off:

1. clipping: the gradient's norm is held to a fraction of its own decaying rolling maximum (`clip=None`: off);
2. the denominator is a decaying maximum of |gradient|, as in AdaMax (`denominator="rms"`: as in Adam);
3. weight decay is part of the update, before the trust ratio (`decay="decoupled"`: as in AdamW);
4. a LAMB trust ratio |weights| / |update|, the update norm smoothed; vectors have none (`trust_power=0`: off);
5. bias corrections are running averages of 1, so they stay right when a beta changes (`1 - beta ** step` does not).

With 1 to 4 switched off it is AdamW. Shapes: P parameters, those with a trust ratio first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.knobs import LARGEST

DENOMINATORS, DECAYS = ("max", "rms"), ("update", "decoupled")
TRUST_FLOOR = 1e-3  # of the trust ratio
TINY_NORM = 1e-8  # weights or an update below it have no trust ratio

# With the two betas the paper's eight knobs: name of the hyperparameter -> the most it may be. The least is 0.
MOST = {
    "lr": LARGEST,
    "weight_decay": LARGEST,
    "eps": LARGEST,
    "clip": 1.0,  # fraction of the rolling maximum of the gradient norm
    "clip_decay": 1.0,  # of that maximum, per step
    "norm_decay": 1.0,  # of the running average of the update norm, per step; 1: no smoothing
}


# -----------------------------------------------------------------------------
# the mathematics: everything stays on the device; a number is a float or a 0-D tensor


def clip_factor(norm: Tensor, largest: Tensor, clip: float | Tensor, decay: float | Tensor) -> Tensor:
    """What gradients of this norm are multiplied by, (). `largest` (), the rolling maximum, is updated in place."""
    torch.maximum(norm, largest * (1 - decay), out=largest)
    return (clip * largest / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)


def trust_ratio(weights: Tensor, update: Tensor, smoothed: Tensor, power: float) -> Tensor:
    """From norms (P,): `(weights / smoothed) ** power`, at least `TRUST_FLOOR ** power`; 1 where a norm is tiny."""
    ratio = (weights / smoothed.clamp_min(TINY_NORM)).clamp_min(TRUST_FLOOR) ** power
    return torch.where((weights < TINY_NORM) | (update < TINY_NORM), 1.0, ratio)


def inner_update(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    denominators: list[Tensor],
    averages: Tensor,
    numbers: dict[str, Any],
    *,
    rms: bool,
    decoupled: bool,
    trust_power: float,
    trusted: int,
) -> None:
    """One step on P parameters, in place; gradients are clipped already. The first `trusted` have a trust ratio.

    `averages` (P, 4): running averages of 1 under beta1, under beta2 and under the decay of the update norm, and the
    running average of the update norm itself. All but `params` have the state's dtype.
    """
    (beta1, beta2), o3 = numbers["betas"], numbers["norm_decay"]
    o1, o2 = 1 - beta1, 1 - beta2
    lr, weight_decay, dtype = numbers["lr"], numbers["weight_decay"], momenta[0].dtype
    weights = params if params[0].dtype == dtype else [p.to(dtype) for p in params]

    torch._foreach_mul_(momenta, beta1)
    torch._foreach_add_(momenta, torch._foreach_mul(grads, o1))
    torch._foreach_mul_(denominators, beta2)
    averages[:, 0] += o1 * (1 - averages[:, 0])
    averages[:, 1] += o2 * (1 - averages[:, 1])
    if rms:
        torch._foreach_add_(denominators, torch._foreach_mul(torch._foreach_mul(grads, grads), o2))
        below = torch._foreach_div(denominators, averages[:, 1].unbind())
        torch._foreach_sqrt_(below)
    else:
        torch._foreach_maximum_(denominators, torch._foreach_abs(grads))
        below = torch._foreach_mul(denominators, 1.0)
    torch._foreach_add_(below, numbers["eps"])
    update = torch._foreach_div(momenta, averages[:, 0].unbind())
    torch._foreach_div_(update, below)
    if not decoupled:
        torch._foreach_add_(update, torch._foreach_mul(weights, weight_decay))

    sizes = torch.ones_like(averages[:, 0]) * lr  # (P,)
    if trusted and trust_power:
        norms = torch.stack(torch._foreach_norm(update[:trusted]))
        averages[:trusted, 2] += o3 * (1 - averages[:trusted, 2])
        averages[:trusted, 3] += o3 * (norms - averages[:trusted, 3])
        smoothed = averages[:trusted, 3] / averages[:trusted, 2]
        own = torch.stack(torch._foreach_norm(weights[:trusted]))
        sizes[:trusted] *= trust_ratio(own, norms, smoothed, trust_power)
    torch._foreach_mul_(update, sizes.unbind())
    if decoupled:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_sub_(params, update)


# -----------------------------------------------------------------------------
# the optimizer


class InnerOptimizer(torch.optim.Optimizer):
    """The paper's inner optimizer. Its numbers are entries of its param groups, read at every step.

    A number is a float, or a 0-D tensor on the parameters' device that is filled in place between steps. A step waits
    for nothing, so it can be captured. State is kept in fp32 or wider, bf16 weights included. The gradient norm that
    clipping looks at is that of all groups together.

    Raises `JelError` for numbers outside their range, and for sparse or complex gradients.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 1e-2,
        eps: float | Tensor = 1e-6,
        clip: float | Tensor | None = 0.8,
        clip_decay: float | Tensor = 1e-2,
        norm_decay: float | Tensor = 0.05,
        denominator: str = "max",
        decay: str = "update",
        trust_power: float = 1.0,
        trust_vectors: bool = False,
    ):
        given = locals()
        names = (*MOST, "betas", "denominator", "decay", "trust_power", "trust_vectors")
        super().__init__(params, {name: given[name] for name in names})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except JelError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient are left out, their running averages too."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        groups = [(group, _buckets(group)) for group in self.param_groups]
        every = [grads for _, buckets in groups for _, grads, _ in buckets]
        if not every:
            return loss
        norms = [torch.stack(torch._foreach_norm(grads)) for grads in every]
        home = norms[0]
        norm = torch.cat([n.to(home.device, home.dtype) for n in norms]).norm()
        for group, buckets in groups:
            factor = self._clip(group, norm) if buckets and group["clip"] is not None else None
            for params, grads, trusted in buckets:
                if factor is not None:
                    grads = list(torch._foreach_mul(grads, factor.to(grads[0].device, grads[0].dtype)))
                self._update(group, params, grads, trusted)
        return loss

    def _clip(self, group: dict, norm: Tensor) -> Tensor:
        """The factor () of this group's gradients. The group's first parameter keeps the rolling maximum."""
        state = self.state[group["params"][0]]
        if "largest_norm" not in state:
            state["largest_norm"] = torch.zeros_like(norm)
            state["clipped"] = torch.zeros_like(norm)
        factor = clip_factor(norm, state["largest_norm"], group["clip"], group["clip_decay"])
        state["clipped"].copy_(factor < 1)  # at this step: what an observer may read
        return factor

    def _update(self, group: dict, params: list[Tensor], grads: list[Tensor], trusted: int) -> None:
        states = [self.state[p] for p in params]
        for state, grad in zip(states, grads, strict=True):
            if "momentum" not in state:
                state["momentum"], state["denominator"] = torch.zeros_like(grad), torch.zeros_like(grad)
                state["averages"] = grad.new_zeros(4)
        averages = torch.stack([state["averages"] for state in states])
        inner_update(
            params,
            grads,
            [state["momentum"] for state in states],
            [state["denominator"] for state in states],
            averages,
            group,
            rms=group["denominator"] == "rms",
            decoupled=group["decay"] == "decoupled",
            trust_power=group["trust_power"],
            trusted=trusted,
        )
        torch._foreach_copy_([state["averages"] for state in states], averages.unbind())

    def load_state_dict(self, state_dict: dict) -> None:
        """As every torch optimizer's, but the state keeps its dtype: torch would round it to a bf16 weight's."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = value.detach().to(p.device, copy=True)


def adamw(
    params: Iterable,
    lr: float | Tensor = 1e-3,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 1e-2,
) -> InnerOptimizer:
    """AdamW, with bias corrections that stay right when a controller moves the betas: what LHOPT's policy trained with.

    torch's own uses `1 - beta ** step`, as if the beta of the moment had always been there.
    """
    numbers = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    parts = {"clip": None, "denominator": "rms", "decay": "decoupled", "trust_power": 0.0}
    return InnerOptimizer(params, lr, **numbers, **parts)  # type: ignore[arg-type]


def _buckets(group: dict) -> list[tuple[list[Tensor], list[Tensor], int]]:
    """(parameters, gradients in fp32 or wider, how many have a trust ratio) per device and dtype; those come first."""
    found: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for p in sorted(group["params"], key=lambda p: p.dim() <= 1):  # a stable order: matrices, then vectors
        if p.grad is not None:
            if p.grad.is_sparse or p.is_complex():
                raise JelError("the inner optimizer takes neither sparse gradients nor complex parameters")
            dtype = torch.promote_types(p.dtype, torch.float32)
            found.setdefault((p.device, p.dtype), []).append((p, p.grad.to(dtype)))
    buckets = []
    for pairs in found.values():
        params, grads = map(list, zip(*pairs))
        trusted = len(params) if group["trust_vectors"] else sum(p.dim() > 1 for p in params)
        buckets.append((params, grads, trusted))
    return buckets


def _check(group: dict) -> None:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise JelError(f"betas are {betas!r}; they must be two numbers from 0 to 1")
    numbers = [(name, group[name], most) for name, most in MOST.items() if name != "clip" or group[name] is not None]
    for name, value, most in [*numbers, ("beta1", betas[0], 1.0), ("beta2", betas[1], 1.0)]:
        if isinstance(value, Tensor):
            continue  # reading it would wait for the device
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
            raise JelError(f"{name} is {value!r}; it must be a number from 0 to {most:g}")
    for name, choices in (("denominator", DENOMINATORS), ("decay", DECAYS)):
        if group[name] not in choices:
            raise JelError(f"{name} is {group[name]!r}; it must be one of {', '.join(choices)}")
