"""LHOPT in a training loop: a recurrent policy that watches the optimizer and moves its hyperparameters step by step.

    scheduler = jel.Scheduler(optimizer, total_steps, "lhopt")
    ...; optimizer.step(); scheduler.observe(loss=loss); scheduler.step()

There is no rate to choose: it begins at the values that the optimizer was made with, torch's own defaults as well as
any (AdamW: 1e-3, 0.9, 0.999, 1e-2). Give it a validation loss when you have one: `scheduler.observe(val_loss=...)`, and
then `guard=jel.ValidationGuard(...)` too: the shipped policy was trained on runs that go back to their best weights.

Shapes: A knobs, F features.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.optim import Optimizer

from jel.actions import StepKnob
from jel.controller import Controller
from jel.decisions import evenly_spaced
from jel.errors import JelError
from jel.hyperparameters import FROM_ONE, group_names, has, initial
from jel.knobs import Knob, Multipliers
from jel.observer import Observer
from jel.policy import files_digest
from jel.policy_lstm import LstmPolicy, load_lhopt_policy
from jel.unitless import MEASURE_EVERY

MOST_MEASUREMENTS = 32  # a window: in training there were at most a few
DECISIONS = 20  # a run, where the policy's card does not say
WIDE = (1e-9, 1e9)  # of a multiplier: the knobs bound the values themselves
NEVER_VARIED = 1e-12  # variance of a feature that was the same in all of training
# what a training environment reports where it does not measure these; a policy from there must not see them vary
UNMEASURED = {"clipped": 0.0, "above_epsilon": 1.0}
# The paper's eight knobs of `jel.InnerOptimizer`, with its action sets and bounds; a shift of the logit for `clip`.
_HALF_OR_DOUBLE = (0.5, 2.0)
PAPER_KNOBS = tuple(
    StepKnob(Knob(name, name, scale="logit" if name == "clip" else "log", bounds=bounds), steps)
    for name, steps, bounds in (
        ("lr", (0.5, 0.707, 0.9, 1.0, 1.1, 1.414, 2.0), (1e-8, 1.0)),
        ("weight_decay", _HALF_OR_DOUBLE, (1e-8, 1.0)),
        ("eps", _HALF_OR_DOUBLE, (1e-8, 1.0)),
        ("ombeta2", _HALF_OR_DOUBLE, (1e-5, 0.1)),
        ("ombeta1", _HALF_OR_DOUBLE, (1e-5, 1.0)),
        ("clip", (-1.0, -0.3, 0.3, 1.0), (1e-10, 1 - 1e-10)),
        ("clip_decay", (0.5, 1.0, 2.0), (1e-5, 1.0)),
        ("norm_decay", (1 / 1.5, 1.0, 1.5), (1e-5, 1.0)),
    )
)
# where an optimizer may keep what a policy's knob is called
NAMES = {"ombeta1": ("1-beta1", "1-momentum"), "ombeta2": ("1-beta2",)}


class LhoptController(Controller):
    """The policy, its memory, and what it has made of the hyperparameters; all of it is part of the run's state.

    `policy`: an `LstmPolicy`, the path of a saved one, or None for the one shipped with the package. `greedy`: the
    likeliest step of each knob instead of the mean step. `every`: steps between measurements; None: `MEASURE_EVERY`,
    or as many as make `MOST_MEASUREMENTS` in a window between two decisions. Raises `JelError` for a policy that cannot
    be read or that wants checkpoint registers.
    """

    observes = frozenset({"progress"})  # the rest it sees through its observer
    watches = True  # as a `PolicyController` that has one: what it will do is not known before the run

    def __init__(self, policy: LstmPolicy | str | Path | None = None, greedy: bool = False, every: int | None = None):
        if isinstance(policy, LstmPolicy):
            self.policy, card = copy.deepcopy(policy).requires_grad_(False), dict[str, Any]()
        else:
            self.policy, card = load_lhopt_policy(policy)
        if self.policy.restart.registers:
            raise JelError("this policy saves and loads checkpoints, which a scheduler does not do for it")
        self.greedy, self.every = greedy, every
        self._window = 0  # steps between two decisions
        self.decisions = int(card.get("decisions", DECISIONS))
        self.digest = files_digest(safetensors.torch.save(self.policy.state_dict()), self.policy.architecture())
        self._constants = {name: value for name, value in UNMEASURED.items() if _never_varied(self.policy, name)}
        names = {n for k in self.policy.actions.knobs for n in _names(k.knob.hyperparameter)}
        self.knobs = tuple(Knob(name, name, bounds=WIDE) for name in sorted(names))
        self.observer: Observer | None = None

    def decision_steps(self, total_steps: int) -> list[int]:
        """As in training: so many decisions a run, 0 first, fewer where the run has fewer steps."""
        self._window = total_steps // self.decisions
        return evenly_spaced(self.decisions, total_steps)

    def attach(self, optimizer: Optimizer) -> None:
        """Begin a run of this optimizer, at the values that it has now."""
        self.detach()
        every = self.every or max(MEASURE_EVERY, self._window // MOST_MEASUREMENTS)
        self.observer = Observer(optimizer, every, self.policy.end_weights, constants=self._constants)
        self._found = [_find(optimizer, k.knob.hyperparameter) for k in self.policy.actions.knobs]
        defaults = [sum(k.knob.bounds) / 2 for k in self.policy.actions.knobs]  # of what is not there: never used
        starts = [found[1] if found else value for found, value in zip(self._found, defaults)]
        self._there = torch.tensor([found is not None for found in self._found])
        self._start = torch.tensor(starts, dtype=torch.float64)
        self._begin()
        self._group_names, self._groups = group_names(optimizer), optimizer.param_groups
        if not self._there.any():
            self.detach()
            names = ", ".join(self.policy.actions.names)
            raise JelError(f"the policy turns {names}, and this optimizer has none of them above 0")

    def _begin(self) -> None:
        self._state, self._decided, self._warned = self.policy.initial_state(), 0, False
        self._values, self._last_move = self._start.clone(), torch.zeros(len(self._start))

    def detach(self) -> None:
        """Stop watching."""
        if self.observer is not None:
            self.observer.close()
        self.observer = None

    def observe(self, train_loss: Any = None, val_loss: Any = None, grad_norm: Any = None, **others: Any) -> bool:
        """What `Scheduler.observe` is told, see `Observer.observe`. True: decide anew.

        That is where a validation loss is given before the first step: the first decision should know it.
        """
        observer = self._watching()
        observer.observe(train_loss, val_loss, grad_norm)
        if val_loss is None or self._decided != 1 or observer.steps:
            return False
        observer.memory = self.policy.new_memory()
        self._begin()
        return True

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        """The multipliers of the values that the optimizer was made with. Raises `JelError` if it was told no loss."""
        observer, actions = self._watching(), self.policy.actions
        if observer.steps and not observer.losses:
            raise JelError("lhopt watches the training loss: call scheduler.observe(loss=loss) at every step")
        if observer.losses and not self._warned and not bool((observer.mean_loss > 0).all()):
            self._warned = True
            warnings.warn("jel: lhopt was told a loss that is not a number above 0, as it has never seen", stacklevel=2)
        relative = actions.relative(self._values, self._start)
        features = observer.look(observation["progress"], relative, self._last_move)
        act = self.policy.act(features, self._state, self.greedy)
        self._state, self._last_move = act.state, torch.where(self._there, act.moves, 0.0)
        self._values = torch.where(self._there, actions.apply(self._values, act.moves), self._values)
        self._decided += 1
        return self._multipliers()

    def applied(self, held: list[dict[str, float]]) -> None:
        """What the scheduler wrote, a group each: the user's bounds and the guard may hold other values than ours."""
        for a, found in enumerate(self._found):
            for group, own in zip(self._groups, held):
                name = next((name for name in (found[0] if found else ()) if name in own), None)
                if name is not None:
                    factor = own[name] / (own["1-momentum"] if name == "lr" and _sums(group, own) else 1.0)
                    value = float(self._start[a]) * factor
                    if abs(value - float(self._values[a])) > 1e-6 * value:
                        self._values[a] = value
                    break

    def _multipliers(self) -> Multipliers:
        """Of all groups together where they have the same hyperparameters, else by group."""
        factors = (self._values / self._start).tolist()
        rows = [_row(group, self._found, factors) for group in self._groups]
        return {"*": rows[0]} if all(row == rows[0] for row in rows) else dict(zip(self._group_names, rows))

    def _watching(self) -> Observer:
        if self.observer is None:
            raise JelError("lhopt watches an optimizer: give it to jel.Scheduler, or call attach(optimizer) first")
        return self.observer

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy_sha256": self.digest,
            "recurrent": self._state.clone() if self.observer else None,
            "start": self._start.tolist() if self.observer else None,
            "values": self._values.tolist() if self.observer else None,
            "last_move": self._last_move.tolist() if self.observer else None,
            "decided": self._decided if self.observer else 0,
            "observer": self.observer.state_dict() if self.observer else None,
        }

    def load_state_dict(self, state: dict) -> None:
        if state.get("policy_sha256") != self.digest:
            theirs = str(state.get("policy_sha256"))
            raise JelError(
                f"the saved run was controlled by policy {theirs[:12]}, this is policy {self.digest[:12]}: "
                "resume with the policy that the run began with"
            )
        if state["observer"] is None:
            return
        self._watching().load_state_dict(state["observer"])
        self._state = state["recurrent"].clone()
        self._start, self._values = (torch.tensor(state[k], dtype=torch.float64) for k in ("start", "values"))
        self._last_move, self._decided = torch.tensor(state["last_move"]), int(state["decided"])


class ProbedLhopt(LhoptController):
    """For a loop that measures `probe_loss` where a controller asks for it, as base_train does: its validation loss.

    In training a policy that was shown one was under a guard too, which base_train does not have.
    """

    observes = frozenset({"progress", "probe_loss"})

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        self._watching().observe(val_loss=observation["probe_loss"])
        return super().decide(observation)


def _never_varied(policy: LstmPolicy, statistic: str) -> bool:
    norm = policy.trunk.norm
    cdfs = [i for i, name in enumerate(policy.features) if name.startswith(f"{statistic}_cdf_")]
    return bool(norm.seen > 0) and bool((norm.var[cdfs] < NEVER_VARIED).all())


def _names(hyperparameter: str) -> tuple[str, ...]:
    return NAMES.get(hyperparameter, (hyperparameter,))


def _row(group: dict, found: list[tuple[tuple[str, ...], float] | None], factors: list[float]) -> dict[str, float]:
    """The multipliers of one group: each knob under the first of its names that the group has."""
    row = {}
    for knob, factor in zip(found, factors):
        names = [name for name in knob[0] if has(group, name)] if knob else []
        row.update({name: factor for name in names[:1]})
    if _sums(group, row):  # without this a momentum would also be a rate
        row["lr"] = row.get("lr", 1.0) * row["1-momentum"]
    return row


def _sums(group: dict, row: Mapping[str, float]) -> bool:
    """Whether it is torch's SGD, which sums gradients instead of averaging them, under a momentum of ours."""
    return "dampening" in group and "1-momentum" in row


def _find(optimizer: Optimizer, hyperparameter: str) -> tuple[tuple[str, ...], float] | None:
    """(its names here, its value in the group of most elements where it is above 0); None where there is none."""
    best: tuple[int, float] | None = None
    for group in optimizer.param_groups:
        for name in _names(hyperparameter):
            if has(group, name):
                value = float(initial(group, name))
                value = 1 - value if name.startswith(FROM_ONE) else value
                size = sum(p.numel() for p in group["params"])
                most = 1.0 if name.startswith(FROM_ONE) else float("inf")  # at 1 there is no momentum to turn
                if 0 < value < most and (best is None or size > best[0]):
                    best = size, value
                break
    return (_names(hyperparameter), best[1]) if best else None
