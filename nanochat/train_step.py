"""One training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nanochat.common import Compute


def train_step(
    forward: Callable[[Tensor, Tensor], Tensor],
    optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    compute: Compute,
    accept: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    total = None
    for inputs, targets in batches:
        with compute.autocast():
            loss = forward(inputs, targets)
        (loss.sum() / len(batches)).backward()
        total = loss.detach() if total is None else total + loss.detach()
    total = total / len(batches)
    if accept is None or accept(total):
        optimizer.step()
    return total
