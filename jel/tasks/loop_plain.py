"""Anyone's PyTorch loop as episodes, one after another: the reference for every faster way of running them.

`Loop` is what the user gave; `PlainEpisodes` trains with the user's own model, loss and optimizer, an instance for each
episode. Every random number of an episode descends from the loop's seed, the group and the step, so the episodes of a
group share initialisation, data and dropout, and nothing depends on how a group is split over processes.
e episodes side by side.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jel.errors import JelError
from jel.knobs import Multipliers, apply_multipliers

SCHEDULED = ("lr", "weight_decay")  # what a base schedule may change, and a controller turn


# -----------------------------------------------------------------------------
# randomness


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) that depends on all of the parts, by their repr, and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also keeps a traceback for devices not in use: slow
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is drawn or seeded inside, the generators of torch, numpy and Python go on as if nothing was."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


# -----------------------------------------------------------------------------
# the loop


@dataclass(frozen=True)
class Loop:
    """A training loop in pieces. See `jel.tasks.loop.LoopTask` for what each is."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batches: Any
    loss: Callable[[nn.Module, Any], Tensor]
    probe: Sequence[Any]
    make_scheduler: Callable[[torch.optim.Optimizer, int], Any] | None = None
    clip_norm: float | None = None
    seed: int = 0

    def model(self, group: int) -> nn.Module:
        seed_all(seed_of(self.seed, "model", group))
        model = self.make_model()
        if not isinstance(model, nn.Module):
            raise JelError(f"make_model gave {type(model).__name__}, not a torch.nn.Module")
        return model.train()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The user's optimizer, each of its groups with a name: its own, or its number."""
        optimizer = self.make_optimizer(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise JelError(f"make_optimizer gave {type(optimizer).__name__}, not a torch.optim.Optimizer")
        own = {id(p) for p in model.parameters()}
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise JelError(
                "make_optimizer(model) gave an optimizer of other parameters than the model's that it was given"
            )
        for i, group in enumerate(optimizer.param_groups):
            group["name"] = str(group.get("name", i))
        names = [group["name"] for group in optimizer.param_groups]
        if len(set(names)) < len(names) or "*" in names:
            raise JelError(f"the names of the optimizer's param groups must differ, and none be '*', not {names}")
        return optimizer


def group_facts(optimizer: torch.optim.Optimizer) -> tuple[tuple, ...]:
    """(name, lr, weight decay or None, tensors, parameters) of each group: what must not change between episodes."""
    return tuple(
        (
            group["name"],
            *(None if group.get(key) is None else float(group[key]) for key in SCHEDULED),
            len(group["params"]),
            sum(p.numel() for p in group["params"]),
        )
        for group in optimizer.param_groups
    )


class BaseSchedule:
    """What the loop without a controller gives its groups at each of `num_steps` steps, read off a real scheduler.

    Raises `JelError` if the scheduler changes more than learning rate and weight decay.
    """

    def __init__(self, loop: Loop, optimizer: torch.optim.Optimizer, num_steps: int):
        read = lambda: [
            {key: float(group[key]) for key in SCHEDULED if key in group} for group in optimizer.param_groups
        ]
        fixed = [{k for k in group if k not in (*SCHEDULED, "params")} for group in optimizer.param_groups]
        others = lambda: [{k: group[k] for k in keys} for keys, group in zip(fixed, optimizer.param_groups)]
        before = others()
        if loop.make_scheduler is None:
            self._rows = [read()]
            return
        with warnings.catch_warnings():  # that the optimizer took no step: it is not there to take any
            warnings.simplefilter("ignore")
            scheduler = loop.make_scheduler(optimizer, num_steps)
            if not hasattr(scheduler, "step") or isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise JelError(f"make_scheduler gave {type(scheduler).__name__}; it must give a schedule over steps")
            self._rows, touched = [read()], others() != before
            for _ in range(num_steps - 1):
                scheduler.step()
                self._rows.append(read())
                touched = touched or others() != before
        if touched:
            raise JelError(
                "the base scheduler changes more than lr and weight_decay (OneCycleLR: pass cycle_momentum=False)"
            )

    def __call__(self, step: int) -> list[dict[str, float]]:
        return self._rows[min(step, len(self._rows) - 1)]


class BatchStream:
    """The batches of a group's episodes by step, begun again when they end.

    A sequence (list, tuple) starts at a place drawn from the seed and goes round; any other iterable is iterated anew
    under the step's seed, so that a DataLoader shuffles differently in each group and pass; a function is called with
    a seed of the group and pass.
    """

    def __init__(self, loop: Loop, group: int):
        self.seed, self.batches, self._passes = seed_of(loop.seed, "data", group), loop.batches, 0
        self._iterator: Iterator[Any] = iter(())

    def __call__(self, step: int) -> Any:
        """The batch of this step; steps are asked for one after another."""
        if isinstance(self.batches, (list, tuple)) and self.batches:
            return self.batches[(self.seed + step) % len(self.batches)]
        for _ in range(2):
            for batch in self._iterator:
                return batch
            self._iterator = iter(self._begin())
            self._passes += 1
        raise JelError("there are no training batches")

    def _begin(self) -> Iterable[Any]:
        if isinstance(self.batches, Iterable):
            return self.batches
        return self.batches(seed_of(self.seed, self._passes))


# -----------------------------------------------------------------------------
# episodes


class PlainEpisodes:
    """A `Task` (see jel/tasks/base.py) over a loop: e models and optimizers, trained in turn at every step.

    `facts`: the `group_facts` that every episode's optimizer must have; raises `JelError` where they differ.
    """

    def __init__(self, loop: Loop, num_steps: int, facts: tuple[tuple, ...]):
        self.loop, self.steps, self.facts = loop, num_steps, facts
        self.groups = tuple(fact[0] for fact in facts)
        self._base: BaseSchedule | None = None

    def num_steps(self, group: int) -> int:
        return self.steps

    def reset(self, group: int, episodes: range) -> None:
        with own_randomness():
            first = self.loop.model(group)
            self.models = [first, *(copy.deepcopy(first) for _ in episodes[1:])]
            self.optimizers = [self.loop.optimizer(model) for model in self.models]
            for optimizer in self.optimizers:
                check_groups(self.facts, group_facts(optimizer))
            if self._base is None:
                self._base = BaseSchedule(self.loop, self.loop.optimizer(first), self.steps)
            self.group, self._batch_of = group, BatchStream(self.loop, group)
        self._losses = torch.full((len(self.models),), float("nan"))
        self._norms = torch.full((len(self.models),), float("nan"))
        self._slots: dict[int, list] = {}

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        assert self._base is not None
        e = len(self.models)
        own = [
            {g: {key: float(torch.as_tensor(m).expand(e)[i]) for key, m in of.items()} for g, of in multipliers.items()}
            for i in range(e)
        ]
        with own_randomness():
            for step in range(first_step, first_step + steps):
                seed = seed_of(self.loop.seed, "step", self.group, step)
                seed_all(seed)
                batch = self._batch_of(step)
                for i in range(e):
                    seed_all(seed)
                    apply_multipliers(self.optimizers[i].param_groups, self._base(step), own[i])
                    self._losses[i], self._norms[i] = self._step(self.models[i], self.optimizers[i], batch)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> tuple[float, float]:
        """One training step: (loss, norm of the gradient before clipping)."""
        optimizer.zero_grad()
        loss = self.loop.loss(model, batch)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.loop.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.loop.clip_norm, norm)
        optimizer.step()
        return float(loss.detach()), float(norm)

    @torch.no_grad()
    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        known = {
            "probe_loss": self._probe_losses,
            "train_loss": lambda: self._losses.clone(),
            "grad_norm": lambda: self._norms.clone(),
        }
        return {name: reading(known, name) for name in names}

    def _probe_losses(self) -> Tensor:
        found = []
        with own_randomness():
            for model in self.models:
                model.eval()
                seed_all(seed_of(self.loop.seed, "probe"))
                found.append(torch.stack([self.loop.loss(model, batch).float().cpu() for batch in self.loop.probe]))
                model.train()
        return torch.stack([losses.mean() for losses in found])

    def save(self, slot: int, episodes: Tensor) -> None:
        kept = self._slots.setdefault(slot, [None] * len(self.models))
        for i in episodes.nonzero().flatten().tolist():
            kept[i] = copy.deepcopy((self.models[i].state_dict(), self.optimizers[i].state_dict()))

    def load(self, slot: int, episodes: Tensor) -> None:
        for i in episodes.nonzero().flatten().tolist():
            if self._slots.get(slot, [None] * (i + 1))[i] is None:
                raise JelError(f"nothing was saved in slot {slot} of this episode")
            model, optimizer = copy.deepcopy(self._slots[slot][i])
            self.models[i].load_state_dict(model)
            self.optimizers[i].load_state_dict(optimizer)

    def close(self) -> None:
        pass


def reading(known: Mapping[str, Callable[[], Tensor]], name: str) -> Tensor:
    if name not in known:
        raise JelError(f"episodes of a loop do not measure {name}; they measure {', '.join(known)}")
    return known[name]()


def check_groups(expected: tuple[tuple, ...], found: tuple[tuple, ...]) -> None:
    """Raise `JelError` unless an episode's optimizer has the param groups that the first one had."""
    if expected != found:
        known = "name, lr, weight decay, tensors, parameters"
        differing = [f"{a} became {b}" for a, b in zip(expected, found) if a != b]
        what = differing[0] if differing else f"{len(expected)} became {len(found)}"
        raise JelError(f"the optimizer's param groups change between episodes ({known}): {what}")
