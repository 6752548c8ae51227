"""The values that multipliers act on, a param group each, whoever else writes into the groups meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jel.decisions import Held
from jel.errors import JelError
from jel.hyperparameters import FROM_ONE, Value, copied, has, initial, live, scaled, unscaled, write


def first_rates(groups: list[dict[str, Any]], from_inner: bool) -> list[Value]:
    """The learning rates that multipliers begin on: what an inner scheduler has left in the groups, else `initial_lr`,
    or what a group holds where that is lower, since a warm-up that was attached before has then begun.

    Raises `JelError` where that is 0 and `initial_lr` is not: a schedule that ran before has ended there.
    """
    if from_inner:
        return [copied(live(group, "lr")) for group in groups]
    pairs = [(live(group, "lr"), initial(group, "lr")) for group in groups]
    for i, (held, base) in enumerate(pairs):
        if float(held) == 0 < float(base):
            raise JelError(
                f"the learning rate of param group {i} is 0, from which no multiplier leads up: give what set it as "
                "inner=, or set the rate anew"
            )
    return [copied(held) if float(held) < float(base) else base for held, base in pairs]


class BaseValues:
    """The base value of every hyperparameter that was ever multiplied; `rates`: the learning rates, a group each."""

    def __init__(self, rates: Sequence[Value]):
        self._base: list[dict[str, Value]] = [{"lr": copied(rate)} for rate in rates]
        self._written: list[dict[str, _Written]] = [{} for _ in rates]

    @torch.no_grad()
    def write(self, groups: list[dict[str, Any]], held: Held) -> None:
        """Base x multiplier into the groups, in place; a multiplier of 1 writes the base bit for bit."""
        for group, base, own in zip(groups, self._base, held):
            for name in {"lr": None, **own}:
                if name not in base:
                    base[name] = initial(group, name)
                    key = f"initial_{name.removeprefix(FROM_ONE)}"
                    group.setdefault(key, copied(base[name]))  # saved with the optimizer, as torch does for lr
                write(group, name, scaled(name, base[name], own.get(name, 1.0)))
        for group, own, written in zip(groups, held, self._written):  # groups may share a tensor: all are written now
            for name in {"lr": None, **own}:
                written[name] = _Written(live(group, name))

    def follow(self, groups: list[dict[str, Any]], held: Held) -> bool:
        """Take over what others have written since `write`: a factor on the product is a factor on the base.

        That is how torch's chainable schedulers compose. True if there was anything. Raises `JelError`, and changes
        nothing, for a value that looks like the base itself, set by a scheduler that multiplies nothing (`LambdaLR`,
        `OneCycleLR`).
        """
        found = []
        for i, (group, base, own, written) in enumerate(zip(groups, self._base, held, self._written)):
            for name, before in written.items():
                if not has(group, name) or before.stands(live(group, name)):
                    continue
                new = unscaled(name, live(group, name), own.get(name, 1.0))
                if name == "lr" and _sets_outright(base[name], live(group, name), own.get(name, 1.0)):
                    raise JelError(
                        f"another scheduler sets the learning rate of group {i} outright: give it as inner=, "
                        "and step this one alone"
                    )
                found.append((base, name, new))
        for base, name, new in found:
            base[name] = new
        return bool(found)

    @torch.no_grad()
    def step_inner(self, groups: list[dict[str, Any]], step: Callable[[], None]) -> None:
        """Step an inner scheduler on the base it knows; the groups then hold what it gives, momenta included."""
        products = [{name: copied(live(group, name)) for name in base} for group, base in zip(groups, self._base)]
        _write_all(groups, self._base)
        try:
            step()
        except BaseException:
            _write_all(groups, products)
            raise
        self._base = [{name: copied(live(group, name)) for name in base} for group, base in zip(groups, self._base)]

    def release(self, groups: list[dict[str, Any]], held: Held) -> None:
        """The base into the groups, and nothing of ours beside it. `held`: multipliers of 1."""
        self.write(groups, held)
        for group, base in zip(groups, self._base):
            for name in base.keys() - {"lr"}:
                group.pop(f"initial_{name.removeprefix(FROM_ONE)}", None)

    def state_dict(self) -> list[dict[str, float]]:
        return [{name: float(value) for name, value in base.items()} for base in self._base]

    def load_state_dict(self, state: list[dict[str, float]]) -> None:
        """The next `write` follows these values; tensors are made where a group holds one."""
        for base, saved in zip(self._base, state):
            for name, value in saved.items():
                held = base.get(name)
                base[name] = torch.full_like(held, float(value)) if isinstance(held, Tensor) else float(value)


def _write_all(groups: list[dict[str, Any]], values: Sequence[dict[str, Value]]) -> None:
    for group, own in zip(groups, values):
        for name, value in own.items():
            write(group, name, value)


class _Written:
    """A value as it was written. A tensor that nobody has touched since is known without reading the device."""

    def __init__(self, value: Value):
        self.value = copied(value)
        self.held: Tensor | None = value if isinstance(value, Tensor) else None
        self.version = value._version if isinstance(value, Tensor) else 0

    def stands(self, value: Value) -> bool:
        if isinstance(value, Tensor) and value is self.held and value._version == self.version:
            return True
        return float(value) == float(self.value)


def _sets_outright(base: Value, found: Value, multiplier: float) -> bool:
    """Whether a foreign value lies nearer the base than the product: within a twentieth of the way between the two."""
    base, found, way = float(base), float(found), abs(math.log(multiplier))
    if not base > 0:
        return way > 0 and found > 0  # no factor leads up from 0
    return way > 0.01 and found > 0 and abs(math.log(found / base)) < 0.05 * way
