"""Hugging Face `Trainer` (transformers): three ways to have its rates multiplied.

    Trainer(..., optimizers=(optimizer, jel.Scheduler(optimizer, steps, schedule)))     your own optimizer
    control(trainer, schedule)                     the Trainer's own optimizer and its own warm-up and decay below it
    Trainer(..., callbacks=[JelCallback()])        with either: multipliers in the log, losses for the controller

Checkpoints of the Trainer hold the scheduler's state, so `resume_from_checkpoint` goes on exactly. Under gradient
accumulation the Trainer steps a scheduler once per optimizer step, which is what `total_steps` counts.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import jel
from jel.contract import CONSTANT
from jel.integrations.common import multiplier_values, scheduler_in
from jel.tracking import Tracker


def control(trainer: Trainer, schedule_or_controller: Any, **options: Any) -> JelCallback:
    """Multiply what the trainer's own schedule gives (`lr_scheduler_type`, `warmup_steps`) by a schedule's multipliers.

    Call it before `trainer.train()`. The length of the run is the trainer's. `options` are those of `jel.Scheduler`.
    Returns the callback that it adds. The scheduler is made, and bad input refused, when training starts.
    """
    make = trainer.create_scheduler
    if trainer.args.lr_scheduler_type == "constant":
        options.setdefault("base_schedule", CONSTANT)  # by the name that a schedule's contract has for it

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> jel.Scheduler:
        inner = make(num_training_steps, optimizer)
        if not isinstance(inner, jel.Scheduler):
            own = optimizer if optimizer is not None else trainer.optimizer
            inner = jel.Scheduler(own, num_training_steps, schedule_or_controller, inner=inner, **options)
        trainer.lr_scheduler = inner
        return inner

    trainer.create_scheduler = create_scheduler
    callback = JelCallback()
    trainer.callback_handler.callbacks.insert(0, callback)  # before those that report what is in the logs
    return callback


class JelCallback(TrainerCallback):
    """Adds `jel/<group>/<knob>` to the trainer's logs, and tells the scheduler the losses in them.

    A controller that observes `train_loss` needs `logging_steps` no longer than its interval. `tracker`: also log
    there. The trainer's own report to wandb or TensorBoard shows the multipliers where this callback comes before it:
    `control` puts it there.
    """

    def __init__(self, tracker: Tracker | None = None):
        self.tracker = tracker
        self.scheduler: jel.Scheduler | None = None
        self.multipliers: dict[str, dict[str, float]] = {}  # of the present step, as the trainer's learning_rate is

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lr_scheduler: Any = None, **_: Any
    ) -> None:
        self.scheduler = scheduler_in(lr_scheduler)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.scheduler is not None:
            self.multipliers = self.scheduler.multipliers

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self.scheduler is None or logs is None:
            return
        values = {key.replace("eval_", "val_"): value for key, value in logs.items()}
        if "loss" in logs:
            self.scheduler.observe(loss=float(logs["loss"]))
            logs.update(multiplier_values(self.multipliers))
            state.log_history[-1].update(multiplier_values(self.multipliers))  # kept before this callback was called
        if "eval_loss" in logs:
            self.scheduler.observe(val_loss=float(logs["eval_loss"]))
        if self.tracker is not None and state.is_world_process_zero:
            self.tracker.log(state.global_step, multipliers=self.multipliers, **values)
