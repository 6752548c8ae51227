"""LHOPT assembled from its parts: unitless features, relative steps, a layer-norm LSTM, PPO with a privileged value.

The source is arXiv 2106.00958 and the training configuration published beside it; docs/lhopt.md says what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jel.actions import StepKnob
from jel.errors import JelError
from jel.knobs import Knob
from jel.learn.control import PRIVILEGED
from jel.learn.control_meta import REWARDS, ControlTrainer, Episode
from jel.learn.ppo import PPO, PPOConfig
from jel.policy_lstm import LstmPolicy
from jel.tasks.small.bank import BankTask
from jel.unitless import END_WEIGHTS

PAPER_LR_STEPS = (0.5, 0.707, 0.9, 1.0, 1.1, 1.414, 2.0)
# two larger steps besides: a start a hundred times too low is mended in four decisions instead of seven
LR_STEPS = (0.25, *PAPER_LR_STEPS, 4.0)
KNOBS = {
    "lr": StepKnob(Knob("lr", "lr", bounds=(1e-7, 1.0)), LR_STEPS),
    "weight_decay": StepKnob(Knob("weight_decay", "weight_decay", bounds=(1e-6, 3.0)), (1 / 3, 1.0, 3.0)),
    "ombeta1": StepKnob(Knob("ombeta1", "ombeta1", bounds=(0.01, 0.5)), (0.5, 1.0, 2.0)),
    "ombeta2": StepKnob(Knob("ombeta2", "ombeta2", bounds=(1e-3, 0.3)), (0.5, 1.0, 2.0)),
}


@dataclass(frozen=True)
class LhoptRecipe:
    """The choices. `knobs` names some of `KNOBS`; `paper_steps` leaves out the two largest steps of the rate."""

    knobs: tuple[str, ...] = tuple(KNOBS)
    paper_steps: bool = False
    end_weights: tuple[float, ...] = END_WEIGHTS
    hidden: int = 64
    registers: int = 0
    recurrent: bool = True
    updates: int = 700
    lr_schedule: str = "linear"  # of PPO's rate, or "constant"
    episode: Episode = field(default_factory=Episode)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def step_knobs(self) -> list[StepKnob]:
        if unknown := [name for name in self.knobs if name not in KNOBS]:
            raise JelError(f"unknown knobs {', '.join(unknown)}; there are {', '.join(KNOBS)}")
        steps = {name: KNOBS[name] for name in self.knobs}
        if self.paper_steps and "lr" in steps:
            steps["lr"] = StepKnob(steps["lr"].knob, PAPER_LR_STEPS)
        return list(steps.values())

    def policy(self, seed: int) -> LstmPolicy:
        return LstmPolicy(self.step_knobs(), self.end_weights, self.hidden, self.registers, self.recurrent, seed)

    def trainer(
        self, tasks: Sequence[BankTask], seed: int, workers: int = 1, rank: int = 0, world_size: int = 1
    ) -> ControlTrainer:
        """The whole loop over these tasks. Raises `JelError` for a reward that is none."""
        if self.episode.reward not in REWARDS:
            raise JelError(f"unknown reward {self.episode.reward!r}; there are {', '.join(REWARDS)}")
        ppo = PPO(self.policy(seed), PRIVILEGED + len(tasks), self.ppo, seed)
        decay = (lambda progress: 1 - progress) if self.lr_schedule == "linear" else (lambda progress: 1.0)
        return ControlTrainer(ppo, tasks, self.episode, seed, self.updates, workers, decay, rank, world_size)
