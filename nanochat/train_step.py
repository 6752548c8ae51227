"""The training step: the one function that trains, for `scripts.base_train` and for the episodes of a meta-training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor

from nanochat.common import Compute


def train_step(
    forward: Callable[[Tensor, Tensor], Tensor],
    optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    compute: Compute,
    accept: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Forward and backward over the micro-batches of a step, then the optimizer's update.

    batches: (inputs, targets) of one size, each (B, T) or, with a batch of their own for each run, (R, B, T).
    `forward(inputs, targets)` gives the mean loss, () for one model or (R,) for a batched one, whose runs do not
    influence each other. The hyperparameters are in the param groups before the call.

    `accept(loss)`, if given, sees the mean loss over the micro-batches, detached, with the gradients of this rank in
    `.grad`, and says whether the update is taken. Gradients stay in `.grad` until the next call, where the optimizer
    may have averaged some of them over the ranks. Returns the mean loss, () or (R,).
    """
    optimizer.zero_grad(set_to_none=True)
    total, overlap = None, getattr(optimizer, "reducing", nullcontext)
    for i, (inputs, targets) in enumerate(batches):
        with compute.autocast():
            loss = forward(inputs, targets)
        with overlap() if i == len(batches) - 1 else nullcontext():
            (loss.sum() / len(batches)).backward()
        total = loss.detach() if total is None else total + loss.detach()
    loss = total / len(batches)
    if accept is None or accept(loss):
        optimizer.step()
    return loss
