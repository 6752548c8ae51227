"""Models and data of examples/lhopt_text.py and examples/lhopt_images.py. Nothing here is of JEL.

B batch, T time.
"""

import collections
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

# -----------------------------------------------------------------------------
# text


def word_rows(folder: Path, vocabulary: int, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(rows to train on, rows to validate with, words known): each row (T + 1) numbers of words, 0 the unknown one."""
    read = lambda part: (folder / f"wiki.{part}.tokens").read_text(encoding="utf-8").replace("\n", " <eos> ").split()
    text = [read("train"), read("valid")]
    frequent = collections.Counter(text[0]).most_common(vocabulary - 1)
    numbers = {word: i + 1 for i, (word, _) in enumerate(frequent)}
    rows = []
    for found in text:
        ids = torch.tensor([numbers.get(word, 0) for word in found])
        rows.append(ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1))
    return rows[0], rows[1], len(numbers) + 1


class Transformer(nn.Module):
    """Causal; embedding and output share their weights. Word numbers (B, T) -> logits (B, T, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int):
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=ids.device)
        x = self.words(ids) + self.places(torch.arange(n, device=ids.device))
        return self.head(self.blocks(x, mask=mask, is_causal=True))


# -----------------------------------------------------------------------------
# images


class Cifar(Dataset):
    """CIFAR-10's binary files: records of one byte of label and 3 x 32 x 32 bytes of image."""

    classes, size = 10, 32

    def __init__(self, files: list[Path]):
        rows = np.concatenate([np.fromfile(f, np.uint8).reshape(-1, 3073) for f in files])
        self.labels, self.images = rows[:, 0].astype(np.int64), rows[:, 1:].reshape(-1, 3, 32, 32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[i]).float() / 128 - 1, int(self.labels[i])


class Pictures(Dataset):
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


def image_sets(folder: Path, size: int) -> tuple[Cifar | Pictures, Cifar | Pictures]:
    """To train on and to validate with: CIFAR-10 if its files are there, else the folders train/ and val/."""
    if (folder / "test_batch.bin").exists():
        return Cifar(sorted(folder.glob("data_batch_*.bin"))), Cifar([folder / "test_batch.bin"])
    return Pictures(folder / "train", size), Pictures(folder / "val", size)


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
