"""Episodes of anyone's loop as one batched program: every weight has a leading episode axis (torch.func).

What must hold for that is checked by `why_not_batched`, which ends with a trial against the plain loop. The optimizer
runs here, on one matrix per param group, with the maths of torch.optim's SGD, Adam and AdamW; a tensor of learning
rates, one an episode, takes the place of the number.

Shapes: e episodes, P parameters of a group.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from jel.errors import JelError
from jel.knobs import Multipliers, multipliers_of_group
from jel.tasks.loop_plain import (
    BaseSchedule,
    BatchStream,
    Loop,
    PlainEpisodes,
    check_groups,
    group_facts,
    own_randomness,
    reading,
    seed_all,
    seed_of,
)

# -----------------------------------------------------------------------------
# the optimizers, as functions: they change `p` (e, P) and the state in place


def sgd_update(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, wd: Tensor, options: dict) -> None:
    """torch.optim.SGD without dampening; `lr`, `wd` (e, 1), `g` (e, P)."""
    g = g + wd * p
    if options["momentum"]:
        buffer = state["momentum"].mul_(options["momentum"]).add_(g)
        g = g + options["momentum"] * buffer if options["nesterov"] else buffer
    p.sub_(lr * g)


def adam_update(p: Tensor, g: Tensor, state: dict[str, Tensor], lr: Tensor, wd: Tensor, options: dict) -> None:
    """torch.optim.Adam and AdamW without amsgrad; `lr`, `wd` (e, 1), `g` (e, P); `state["step"]` (e, 1), float64."""
    beta1, beta2 = options["betas"]
    if options["decoupled_weight_decay"]:
        p.mul_(1 - lr * wd)
    else:
        g = g + wd * p
    step = state["step"].add_(1)
    state["mean"].lerp_(g, 1 - beta1)
    state["square"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    size = (lr / (1 - beta1**step)).to(p.dtype)
    root = (1 - beta2**step).sqrt().to(p.dtype)
    p.sub_(size * (state["mean"] / (state["square"].sqrt() / root + options["eps"])))


UPDATES: dict[type, tuple[Callable[..., None], tuple[str, ...]]] = {
    torch.optim.SGD: (sgd_update, ("momentum",)),
    torch.optim.Adam: (adam_update, ("mean", "square")),
    torch.optim.AdamW: (adam_update, ("mean", "square")),
}


# -----------------------------------------------------------------------------
# episodes


class BatchedEpisodes:
    """A `Task` (see jel/tasks/base.py): `PlainEpisodes` of the same arguments, e of them in one program."""

    def __init__(self, loop: Loop, num_steps: int, facts: tuple[tuple, ...]):
        self.loop, self.steps, self.facts = loop, num_steps, facts
        self.groups = tuple(fact[0] for fact in facts)
        self._base: BaseSchedule | None = None

    def num_steps(self, group: int) -> int:
        return self.steps

    def reset(self, group: int, episodes: range) -> None:
        with own_randomness():
            model = self.loop.model(group)
            optimizer = self.loop.optimizer(model)
            check_groups(self.facts, group_facts(optimizer))
            if self._base is None:
                self._base = BaseSchedule(self.loop, self.loop.optimizer(model), self.steps)
            self.group, self._batch_of = group, BatchStream(self.loop, group)
        self._e = e = len(episodes)
        self._update, kept = UPDATES[type(optimizer)]
        self._options = [{k: v for k, v in of.items() if k != "params"} for of in optimizer.param_groups]
        names = {p: name for name, p in model.named_parameters()}
        self._names = [[names[p] for p in of["params"]] for of in optimizer.param_groups]
        self._flat = [_stacked(of["params"], e) for of in optimizer.param_groups]
        self._state: list[dict[str, Tensor]] = [
            {"step": torch.zeros(e, 1, dtype=torch.float64, device=p.device)} | {k: torch.zeros_like(p) for k in kept}
            for p in self._flat
        ]
        self._trained: dict[str, Tensor] = {}
        for flat, of, named in zip(self._flat, optimizer.param_groups, self._names):
            widths = [p.numel() for p in of["params"]]
            for name, p, part in zip(named, of["params"], flat.split(widths, dim=1)):
                self._trained["model." + name] = part.view(e, *p.shape)
        fixed = [*model.named_parameters(), *model.named_buffers()]
        self._fixed = {f"model.{n}": t.detach() for n, t in fixed if f"model.{n}" not in self._trained}
        self._program = _LossOf(model, self.loop.loss)
        self._losses = self._norms = torch.full((e,), float("nan"))
        self._slots: dict[int, list[Tensor]] = {}

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        assert self._base is not None
        own = [multipliers_of_group(multipliers, name) for name in self.groups]
        columns = [{key: torch.as_tensor(m).expand(self._e)[:, None] for key, m in of.items()} for of in own]
        with own_randomness():
            for step in range(first_step, first_step + steps):
                seed_all(seed_of(self.loop.seed, "step", self.group, step))
                self._step(self._batch_of(step), self._base(step), columns)

    def _step(self, batch: Any, base: list[dict[str, float]], columns: list[dict[str, Tensor]]) -> None:
        def loss_of(trained: dict[str, Tensor]) -> Tensor:
            return functional_call(self._program, {**trained, **self._fixed}, (batch,))

        gradients, self._losses = vmap(grad_and_value(loss_of))(self._trained)
        with torch.no_grad():
            flat = [
                torch.cat([gradients["model." + name].flatten(1) for name in named], dim=1) for named in self._names
            ]
            self._norms = torch.stack([g.square().sum(1) for g in flat]).sum(0).sqrt()
            if self.loop.clip_norm is not None:
                factor = (self.loop.clip_norm / (self._norms + 1e-6)).clamp(max=1.0)
                flat = [g * factor[:, None] for g in flat]
            for p, g, state, options, values, m in zip(self._flat, flat, self._state, self._options, base, columns):
                if options["maximize"]:
                    g = -g
                lr, wd = (self._value(values, m, key, p) for key in ("lr", "weight_decay"))
                self._update(p, g, state, lr, wd, options)

    def _value(self, values: dict[str, float], multipliers: dict[str, Tensor], key: str, like: Tensor) -> Tensor:
        """base x multiplier, (e, 1): in float64, as the plain loop's numbers are, then in the parameters' type."""
        product = values[key] * multipliers.get(key, torch.ones(self._e, 1)).to(torch.float64)
        return product.to(like)

    @torch.no_grad()
    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        known = {
            "probe_loss": self._probe_losses,
            "train_loss": lambda: self._losses.detach().float().cpu(),
            "grad_norm": lambda: self._norms.detach().float().cpu(),
        }
        return {name: reading(known, name) for name in names}

    def _probe_losses(self) -> Tensor:
        self._program.eval()
        with own_randomness():
            seed_all(seed_of(self.loop.seed, "probe"))
            found = []
            for batch in self.loop.probe:
                loss_of = lambda trained, b=batch: functional_call(self._program, {**trained, **self._fixed}, (b,))
                found.append(vmap(loss_of)(self._trained).float().cpu())
        self._program.train()
        return torch.stack(found).mean(0)

    def save(self, slot: int, episodes: Tensor) -> None:
        own = self._tensors()
        for kept, t in zip(self._slots.setdefault(slot, [t.clone() for t in own]), own):
            kept[episodes] = t[episodes]

    def load(self, slot: int, episodes: Tensor) -> None:
        if slot not in self._slots:
            raise JelError(f"nothing was saved in slot {slot} of this episode")
        for kept, t in zip(self._slots[slot], self._tensors()):
            t[episodes] = kept[episodes]

    def _tensors(self) -> list[Tensor]:
        return [*self._flat, *(t for state in self._state for t in state.values())]

    def close(self) -> None:
        pass


class _LossOf(nn.Module):
    """Model and loss as one module, so that a loss that calls the model in its own way works with `functional_call`."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _stacked(parameters: list[nn.Parameter], e: int) -> Tensor:
    """(e, P): a row of all the parameters an episode."""
    row = torch.cat([p.detach().flatten() for p in parameters])
    return row.repeat(e, 1)


# -----------------------------------------------------------------------------
# may these episodes be batched?

TRIAL_STEPS, TOLERANCE = 3, 1e-2  # Adam turns rounding of a gradient near 0 into a step: not bits, but the same program


def why_not_batched(loop: Loop, facts: tuple[tuple, ...], episodes: int = 8) -> str | None:
    """None if episodes of this loop may run as one program, else the reason, for a person to read."""
    with own_randomness():
        model = loop.model(0)
        optimizer = loop.optimizer(model)
    if type(optimizer) not in UPDATES:
        return f"{type(optimizer).__name__} is none of SGD, Adam and AdamW"
    for group in optimizer.param_groups:
        if group.get("amsgrad") or group.get("dampening"):
            return "amsgrad and dampening are left to the plain loop"
        if len({(p.dtype, p.device) for p in group["params"]}) != 1 or not all(
            p.requires_grad for p in group["params"]
        ):
            return "a param group mixes devices, types, or trained and frozen tensors"
    if any(h for key, h in vars(optimizer).items() if key.startswith("_optimizer_step_")):
        return "the optimizer has hooks"
    if kept := [name for name, _ in model.named_buffers()]:
        return f"the model keeps state beside its weights ({kept[0]})"
    if too_large(sum(p.numel() * p.element_size() for p in model.parameters()), episodes):
        return f"{episodes} copies of the model and its optimizer would fill the memory"
    try:
        return _trial(loop, facts)
    except JelError:
        raise
    except Exception as e:  # what torch.func cannot do it says in many ways
        reason = " ".join(str(e).split(". ")[0].split())
        return f"torch.func cannot run it ({reason[:120]})"


def too_large(model_bytes: int, episodes: int) -> bool:
    """Weights, gradients, two moments and work space of all episodes against half of the machine's free memory."""
    return 8 * model_bytes * episodes > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


def _trial(loop: Loop, facts: tuple[tuple, ...]) -> str | None:
    """Two episodes, a few steps, both ways."""
    plain, batched = PlainEpisodes(loop, TRIAL_STEPS, facts), BatchedEpisodes(loop, TRIAL_STEPS, facts)
    apart = {"*": {"lr": torch.tensor([1.0, 2.0])}}
    for episodes in (plain, batched):
        episodes.reset(0, range(2))
    start = [flat.clone() for flat in batched._flat]
    for episodes in (plain, batched):
        episodes.train(0, TRIAL_STEPS, apart)
    for optimizer in plain.optimizers:
        if any(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return "some trained tensors have no gradient"
    for i, optimizer in enumerate(plain.optimizers):
        for group, ours, first in zip(optimizer.param_groups, batched._flat, start):
            reference = _stacked(group["params"], 1)[0]
            moved, apart_by = (reference - first[i]).norm(), (reference - ours[i]).norm()
            if not apart_by <= TOLERANCE * moved:
                return "its batched program does not agree with the plain loop"
    a, b = (episodes.observe(["probe_loss"])["probe_loss"] for episodes in (plain, batched))
    return (
        None if torch.allclose(a, b, rtol=1e-3, atol=1e-4) else "its batched probe loss differs from the plain loop's"
    )
