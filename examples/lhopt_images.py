"""A residual network on images under "lhopt": CIFAR-10's binary files, or folders of pictures as ImageNet's.

    python -m examples.lhopt_images cifar-10-batches-bin --epochs 10
    python -m examples.lhopt_images imagenet --size 224 --width 64 --epochs 90      (needs pillow)

A folder of pictures holds train/CLASS/*.jpg and val/CLASS/*.jpg. The shipped policy never saw an image larger than
8 x 8, a residual network or a run of more than a few hundred steps; full ImageNet has not been run by us.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import jel
from examples.models_and_data import image_sets, residual_network


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: str, batches: int) -> tuple[float, float]:
    """(loss, accuracy) over the first so many batches."""
    model.eval()
    losses, hits, count = [], 0, 0
    for (x, y), _ in zip(loader, range(batches)):
        out = model(x.to(device))
        losses.append(F.cross_entropy(out, y.to(device)))
        hits, count = hits + int((out.argmax(1).cpu() == y).sum()), count + len(y)
    model.train()
    return float(torch.stack(losses).mean()), hits / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="of pictures from folders")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--val-batches", type=int, default=20, help="for the policy, 20 times a run")
    parser.add_argument("--policy", default="lhopt", help="lhopt, the shipped one, or the path of another's card")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_set, val_set = image_sets(args.data, args.size)
    kept = {"batch_size": args.batch, "num_workers": args.workers, "shuffle": True}
    loader, val_loader = DataLoader(train_set, drop_last=True, **kept), DataLoader(val_set, **kept)
    model = residual_network(args.width, train_set.classes, train_set.size).to(args.device)
    steps = args.epochs * len(loader)
    optimizer = jel.adamw(model.parameters())
    guard = jel.ValidationGuard.of(model)  # keeps the best weights on validation; the end is their mean
    scheduler = jel.Scheduler(optimizer, steps, args.policy, guard=guard)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_set):,} images, {steps:,} steps")
    val_loss = lambda: evaluate(model, val_loader, args.device, args.val_batches)[0]
    scheduler.observe(val_loss=val_loss())
    for epoch in range(args.epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(args.device)), y.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.observe(loss=loss)
            if scheduler.decision_due:  # 19 times a run
                scheduler.observe(val_loss=val_loss())
            scheduler.step()
        val, accuracy = evaluate(model, val_loader, args.device, len(val_loader))
        rate = optimizer.param_groups[0]["lr"]
        print(f"epoch {epoch + 1}: val loss {val:.4f}, accuracy {100 * accuracy:.2f}%, lr {rate:.2e}", flush=True)
    scheduler.observe(val_loss=val_loss())
    guard.load_best(val_loss)
    val, accuracy = evaluate(model, val_loader, args.device, len(val_loader))
    print(f"mean of the best on validation: val loss {val:.4f}, accuracy {100 * accuracy:.2f}%")


if __name__ == "__main__":
    main()
