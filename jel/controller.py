"""The contract between a training loop and a controller, and two controllers that keep it.

Every so many steps the loop calls `decide` with what the controller declares it observes (the table of observations is
in jel/features.py), and multiplies each param group's base values by what it gets back
(`jel.knobs.apply_multipliers`) until the next decision.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from jel.contract import Contract
from jel.errors import JelError
from jel.features import WATCHED
from jel.knobs import IDENTITY, Multipliers
from jel.observer import Observer
from jel.policy import GaussianPolicy, default_policy_path, load_policy, policy_digest


@dataclass(frozen=True)
class Decision:
    """What a controller decides: multipliers, and perhaps to go back to an earlier checkpoint first.

    `go_back`: None, or a number of steps: the loop returns to its newest checkpoint that is at least so many steps
    old, and goes on from there under these multipliers.
    """

    multipliers: Multipliers
    go_back: int | None = None


def as_decision(decided: Decision | Multipliers) -> Decision:
    """What `decide` gave, as a `Decision`: a controller may give bare multipliers. Raises `JelError` for a bad one."""
    decision = decided if isinstance(decided, Decision) else Decision(decided)
    if decision.go_back is not None and (type(decision.go_back) is not int or decision.go_back < 0):
        raise JelError(f"go_back is {decision.go_back!r}; it must be a number of steps, or None")
    return decision


class Controller:
    """What a training loop holds. Subclassing is optional: any class with these four members will do.

    One that watches the optimizer has three more, which loops call where they are there: `attach(optimizer)` when a run
    begins, `detach()` when it ends, and `observe(train_loss=...)` after every step.
    """

    observes: frozenset[str] = frozenset({"progress"})  # the observations that `decide` needs

    def decide(self, observation: Mapping[str, float]) -> Decision | Multipliers:
        """Multipliers per param group name, "*" for every group: `{"*": {"lr": 2.0, "weight_decay": 0.5}}`.

        Finite and above 0; they hold until the next decision. A group's own entry wins over "*", hyperparameter by
        hyperparameter. `observation` holds at least what `observes` names, and is not to be changed. A `Decision`
        may ask for a return to a checkpoint besides.
        """
        raise NotImplementedError

    def state_dict(self) -> dict:
        """The controller's part of the run's state: string keys, JSON values or tensors. Empty if it keeps none."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Continue as the controller that gave `state` would have."""
        if state:
            raise JelError(
                f"{type(self).__name__} keeps no state, but the saved run's controller left some: "
                "resume with the controller that the run began with"
            )


class NullController(Controller):
    """Multiplies by exactly 1: the run is, bit for bit, the run without a controller."""

    observes = frozenset()

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        return copy.deepcopy(IDENTITY)


def decay_carry_of(record: Mapping[str, Any]) -> int:
    """The tokens of the episodes from which a run carries its weight decay (docs/design.md); 0: it does not.

    `record`: of a policy's training, or a schedule. Raises `JelError` for what is no number of tokens.
    """
    tokens = record.get("decay_carry", 0)
    if type(tokens) is not int or tokens < 0:
        raise JelError(f"its decay_carry is {tokens!r}, not a number of tokens")
    return tokens


class PolicyController(Controller):
    """JEL: the mean action of a learned policy (paper 3).

    `policy`: a `GaussianPolicy`, the path of a saved one, or None for the one shipped with the package. It is copied,
    so training the policy further does not change the controller. `contract`: what its card says that it was learned
    against, None if nothing; `decay_carry`: see `decay_carry_of`. Raises `JelError` for a policy that cannot be read.
    """

    def __init__(self, policy: GaussianPolicy | str | Path | None = None):
        if isinstance(policy, GaussianPolicy):
            self.policy, card = copy.deepcopy(policy), dict[str, object]()
        else:
            self.policy, card = load_policy(policy or default_policy_path())
        training = card.get("training")
        training = training if isinstance(training, dict) else {}
        record = training.get("contract")
        try:
            self.contract = None if record is None else Contract.from_json(record)
            self.decay_carry = decay_carry_of(training)
        except JelError as e:
            raise JelError(f"policy card of {policy}: {e}") from None
        self.knobs = self.policy.knobs
        self.watches = self.policy.observes.intersection(WATCHED)
        self.observes = self.policy.observes - self.watches
        if self.watches:
            self.observes |= {"progress"}
        self.observer: Observer | None = None
        self.digest = policy_digest(self.policy)

    def attach(self, optimizer: Optimizer) -> None:
        """Begin a run of this optimizer; a policy that reads statistics of the optimizer watches it from now on."""
        self.detach()
        if self.watches:
            self.observer = Observer(optimizer)

    def detach(self) -> None:
        """Stop watching."""
        if self.observer is not None:
            self.observer.close()
        self.observer = None

    def observe(self, train_loss: Any = None, **others: Any) -> None:
        """The training loss of a step, for a policy that watches."""
        if self.observer is not None:
            self.observer.observe(train_loss)

    def decide(self, observation: Mapping[str, float]) -> Multipliers:
        seen: dict[str, float | Tensor] = {name: float(observation[name]) for name in self.observes}
        if self.watches:
            if self.observer is None:
                raise JelError("this policy watches the optimizer: the loop must call attach(optimizer) first")
            seen |= self.observer.statistics(float(seen["progress"]))
        return self.policy.mean_multipliers(seen)

    def state_dict(self) -> dict:
        watched = {"observer": self.observer.state_dict()} if self.observer is not None else {}
        return {"policy_sha256": self.digest, **watched}

    def load_state_dict(self, state: dict) -> None:
        if state.get("policy_sha256") != self.digest:
            theirs = str(state.get("policy_sha256"))
            raise JelError(
                f"the saved run was controlled by policy {theirs[:12]}, this is policy {self.digest[:12]}: "
                "resume with the policy that the run began with"
            )
        if self.observer is not None and "observer" in state:
            self.observer.load_state_dict(state["observer"])
