"""What changes while a run trains, saved and restored as one: on resume, and on going back to a checkpoint."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from jel import IDENTITY, validate_multipliers
from nanochat.checkpoint import (
    CheckpointWriter,
    check_tensors,
    load_checkpoint_together,
    rng_state,
    set_rng_state,
    untrusted,
)
from nanochat.common import Compute, UserError, print0
from nanochat.divergence_guard import REACH
from nanochat.optim_state import state_to_write
from scripts.runs import check_same_flags, resumable_flags


@dataclass
class Progress:
    """What a run holds and last saw. Going back to a checkpoint restores it."""

    multipliers: dict = field(default_factory=lambda: IDENTITY)  # hold until the controller's next decision
    train_loss: float = math.nan  # of the last step taken
    smooth_loss: float = math.nan  # its exponential average, 0.9
    grad_norm: float = math.nan  # of the last step taken, if the controller observes it
    returned_to: int = -1  # the step that the controller asked to go back to, where it does not decide again

    def took(self, loss: float) -> None:
        """A step with this loss was taken."""
        self.train_loss = loss
        self.smooth_loss = loss if math.isnan(self.smooth_loss) else 0.9 * self.smooth_loss + 0.1 * loss

    def load_state_dict(self, state: dict, group_names: list[str]) -> None:
        """Raises what a malformed state raises; see `untrusted`."""
        for name in ("train_loss", "smooth_loss", "grad_norm"):
            setattr(self, name, float(state[name]))
        self.returned_to = int(state["returned_to"])
        self.multipliers = {g: {k: float(v) for k, v in own.items()} for g, own in state["multipliers"].items()}
        validate_multipliers(self.multipliers, group_names)


@dataclass
class Cost:
    """What a run has spent. Steps that it went back over were spent too: only a resume restores it."""

    steps: int = 0  # forward and backward, whether the update was taken or not
    timed_steps: int = 0  # without those that compiled
    seconds: float = 0.0  # of the timed steps
    warm_up_seconds: float = 0.0  # of the others
    forward_tokens: int = 0  # that only went forward: validation, test, probes, a second look at a batch
    decisions: int = 0
    controller_seconds: float = 0.0

    def add_step(self, seconds: float, warm_up: bool) -> None:
        """A step took so long. One that compiled (`warm_up`) is charged at the mean of the others."""
        self.steps += 1
        if warm_up:
            self.warm_up_seconds += seconds
        else:
            self.timed_steps, self.seconds = self.timed_steps + 1, self.seconds + seconds

    def total(self, batch_tokens: int, flops_per_token: float, compute: Compute) -> dict[str, float]:
        """Seconds of training steps, core-seconds, operations (a forward pass: a third of a step), decisions."""
        seconds = self.warm_up_seconds
        if self.timed_steps:
            seconds = self.seconds + (self.steps - self.timed_steps) * self.seconds / self.timed_steps
        cores = compute.world_size * (1 if compute.is_cuda else torch.get_num_threads())
        return {
            "seconds": seconds,
            "core_seconds": seconds * cores,
            "flops": flops_per_token * (self.steps * batch_tokens + self.forward_tokens / 3),
            "decisions": self.decisions,
            "controller_seconds": self.controller_seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises what a malformed state raises, and ValueError for a number that cannot be a cost."""
        for name, mine in asdict(self).items():
            value = type(mine)(state[name])
            if not 0 <= value < math.inf:
                raise ValueError(f"its {name} is {value}")
            setattr(self, name, value)


class RunState:
    """The parts of a run, and their checkpoints under `<folder>/checkpoints`. Saving and loading are collective."""

    def __init__(
        self, folder: Path, args: argparse.Namespace, may_change: set[str], compute: Compute, keep: int, **parts
    ):
        """`keep`: checkpoints to keep. `parts`: model, optimizer, controller (or None), guard, progress and cost."""
        self.folder, self.args, self.may_change, self.compute = folder / "checkpoints", args, may_change, compute
        self.model, self.optimizer, self.controller = parts["model"], parts["optimizer"], parts["controller"]
        self.guard, self.progress, self.cost = parts["guard"], parts["progress"], parts["cost"]
        self.writer = CheckpointWriter(self.folder, keep) if compute.is_main else None

    def save(self, step: int) -> None:
        """Save in the background, unless a weight is not finite: broken weights are no way back."""
        optimizer = state_to_write(self.optimizer, keep=self.writer is not None)
        if self.writer is None:
            return
        state = {
            "flags": resumable_flags(self.args, self.may_change),
            "model": self.model.state_dict(),
            "optimizer": optimizer,
            "controller": self.controller.state_dict() if self.controller else {},
            "progress": asdict(self.progress),
            "cost": asdict(self.cost),
            "guard": self.guard.state_dict(),
            "rng": rng_state(self.compute.device),
        }
        if all(t.isfinite().all() for t in state["model"].values()):
            self.writer.save(step, state)

    def resume(self) -> int | None:
        """Load the newest whole checkpoint; its step, or None if there is none."""
        found = load_checkpoint_together(self.folder, self.compute)
        if found is None:
            return None
        step, saved = found
        self._load(saved)
        with untrusted(f"checkpoint in {self.folder}"):
            if self.controller:
                self.controller.load_state_dict(saved["controller"])
            self.guard.load_state_dict(saved["guard"])
            self.cost.load_state_dict(saved["cost"])
        print0(f"resumed at step {step} from {self.folder}")
        return step

    def go_back(self, before: int, controller_too: bool) -> tuple[int, dict]:
        """Load the newest checkpoint of a step up to `before`, or the oldest if all are later.

        Returns its step and its multipliers; {} at step 0, before the first decision. The guard keeps what it has
        learnt and forgets the losses since. A controller that asked for the return keeps its state (`controller_too`
        False), or it would ask again. Raises `UserError` if there is no checkpoint.
        """
        self.model.zero_grad(set_to_none=True)
        if self.writer:
            self.writer.wait()
        found = load_checkpoint_together(self.folder, self.compute, before)
        if found is None:
            raise UserError("the run has no checkpoint to go back to; give --save-every, or lower the learning rates")
        step, saved = found
        self._load(saved)
        with untrusted(f"checkpoint in {self.folder}"):
            if self.controller and controller_too:
                self.controller.load_state_dict(saved["controller"])
            self.guard.rewind(saved["guard"])
        return step, self.progress.multipliers if step else {}

    def close(self) -> None:
        """Wait for a checkpoint under way; raises what went wrong in it."""
        if self.writer:
            self.writer.close()

    def _load(self, saved: dict) -> None:
        what = f"checkpoint in {self.folder}"
        with untrusted(what):
            check_same_flags(saved["flags"], self.args, self.may_change, self.folder.parent)
            check_tensors(self.model.state_dict(), saved["model"], what)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress.load_state_dict(saved["progress"], [g["name"] for g in self.optimizer.param_groups])
            set_rng_state(saved["rng"], self.compute.device)


def checkpoints_to_keep(save_every: int) -> int:
    """Enough for one of them to be older than any damage that has not shown yet."""
    return 2 + REACH // max(1, save_every)
