"""A controller that watches, on a model that it never saw: no rate, no schedule, nothing to tune.

    pip install just-enough-learning
    python examples/lhopt.py

An autoencoder of synthetic curves, trained twice from the same start: AdamW as it comes, and the same under "lhopt".
"""

import argparse
import math

import torch
from torch import nn

import jel


def curves(count: int, seed: int) -> torch.Tensor:
    """Sums of two sines with random pitch and phase, and a little noise: (count, 64)."""
    generator = torch.Generator().manual_seed(seed)
    pitch, phase = (torch.rand(count, 2, 1, generator=generator) for _ in range(2))
    waves = torch.sin((2 + 6 * pitch) * torch.linspace(0, math.pi, 64) + 2 * math.pi * phase)
    return waves.sum(1) + 0.05 * torch.randn(count, 64, generator=generator)


def train(steps: int, controller) -> float:
    """The validation loss at the end; `controller` None: AdamW's own rate to the end."""
    torch.manual_seed(0)
    train_set, val_set = curves(2000, seed=1), curves(500, seed=2)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 6), nn.Linear(6, 96), nn.GELU(), nn.Linear(96, 64)
    )
    optimizer = jel.adamw(model.parameters())  # or any other, torch.optim.AdamW(model.parameters()) for one
    guard = jel.ValidationGuard.of(model)  # keeps the best weights on validation; the end is their mean
    scheduler = jel.Scheduler(optimizer, steps, controller, guard=guard) if controller else None

    @torch.no_grad()
    def val_loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(val_set), val_set)

    if scheduler:
        scheduler.observe(val_loss=val_loss())
    for _ in range(steps):
        x = train_set[torch.randint(len(train_set), (32,))]
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.observe(loss=loss)
            if scheduler.decision_due:  # 19 times a run
                scheduler.observe(val_loss=val_loss())
            scheduler.step()
    if scheduler:
        scheduler.observe(val_loss=val_loss())
        guard.load_best(val_loss)
    return float(val_loss())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--policy", default="lhopt", help="lhopt, the shipped one, or the path of another's card")
    args = parser.parse_args()
    print(f"AdamW at 1e-3, constant: validation loss {train(args.steps, None):.4f}")
    print(f"AdamW under lhopt:       validation loss {train(args.steps, args.policy):.4f}")
