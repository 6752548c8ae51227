"""A residual network on images under "lhopt": CIFAR-10's binary files, or folders of pictures as ImageNet's.

    python examples/lhopt_images.py cifar-10-batches-bin --epochs 10
    python examples/lhopt_images.py imagenet --size 224 --width 64 --epochs 90      (needs pillow)

A folder of pictures holds train/CLASS/*.jpg and val/CLASS/*.jpg. The shipped policy never saw an image larger than
8 x 8, a residual network or a run of more than a few hundred steps; full ImageNet has not been run by us.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import jel


class Cifar(torch.utils.data.Dataset):
    """Records of one byte of label and 3 x 32 x 32 bytes of image."""

    def __init__(self, files: list[Path]):
        rows = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in files])
        self.labels, self.images = rows[:, 0].astype(np.int64), rows[:, 1:].reshape(-1, 3, 32, 32)
        self.classes = 10

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[i]).float() / 128 - 1, int(self.labels[i])


class Pictures(torch.utils.data.Dataset):
    """One folder a class; the middle of each picture, scaled to `size`."""

    def __init__(self, folder: Path, size: int):
        names = sorted(d.name for d in folder.iterdir() if d.is_dir())
        self.files = [(f, i) for i, name in enumerate(names) for f in sorted((folder / name).iterdir())]
        self.size, self.classes = size, len(names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image, ImageOps

        with Image.open(self.files[i][0]) as picture:
            pixels = np.asarray(ImageOps.fit(picture.convert("RGB"), (self.size, self.size)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 128 - 1, self.files[i][1]


class Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(b), nn.BatchNorm2d(b)])
        self.skip = nn.Conv2d(a, b, 1, stride, bias=False) if stride > 1 or a != b else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.skip(x) + self.norms[1](self.two(F.relu(self.norms[0](self.one(x))))))


def residual_network(width: int, classes: int, size: int) -> nn.Module:
    """Three of ResNet-18's four stages; the stem halves large images twice."""
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False)] if size <= 64 else [nn.Conv2d(3, width, 7, 4, 3, bias=False)]
    stages = [
        Block(width * a, width * b, s) for a, b, s in ((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1))
    ]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


@torch.no_grad()
def evaluate(model: nn.Module, loader, device: str, batches: int) -> tuple[float, float]:
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
    if (args.data / "test_batch.bin").exists():
        train_set, val_set = Cifar(sorted(args.data.glob("data_batch_*.bin"))), Cifar([args.data / "test_batch.bin"])
        size = 32
    else:
        train_set, val_set = (Pictures(args.data / part, args.size) for part in ("train", "val"))
        size = args.size
    kept = {"batch_size": args.batch, "num_workers": args.workers}
    loader = torch.utils.data.DataLoader(train_set, shuffle=True, drop_last=True, **kept)
    val_loader = torch.utils.data.DataLoader(val_set, shuffle=True, **kept)
    model = residual_network(args.width, train_set.classes, size).to(args.device)
    steps = args.epochs * len(loader)
    optimizer = jel.adamw(model.parameters())
    scheduler = jel.Scheduler(optimizer, steps, args.policy)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_set):,} images, {steps:,} steps")
    step = 0
    for epoch in range(args.epochs):
        for x, y in loader:
            if step % max(1, steps // 20) == 0:
                scheduler.observe(val_loss=evaluate(model, val_loader, args.device, args.val_batches)[0])
            loss = F.cross_entropy(model(x.to(args.device)), y.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.observe(loss=loss)
            scheduler.step()
            step += 1
        val, accuracy = evaluate(model, val_loader, args.device, len(val_loader))
        rate = optimizer.param_groups[0]["lr"]
        print(f"epoch {epoch + 1}: val loss {val:.4f}, accuracy {100 * accuracy:.2f}%, lr {rate:.2e}", flush=True)


if __name__ == "__main__":
    main()
