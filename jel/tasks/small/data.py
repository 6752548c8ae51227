"""Data for the small tasks: made up, from Python's own standard library, or from scikit-learn where it is installed.

Every function gives three splits; what is made up descends from its generator alone. N rows, D features, L length.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from jel.errors import JelError
from jel.tasks.small.episodes import Split

VOCABULARY = 64  # characters of the text: the 63 most frequent, and one for the rest
# files that every Python has had for long: their source is the text
SOURCES = ("argparse.py", "ast.py", "difflib.py", "doctest.py", "inspect.py", "optparse.py", "pdb.py", "tarfile.py")

Splits = tuple[Split, Split, Split]


def split(inputs: Tensor, targets: Tensor, train: int, val: int, test: int) -> Splits:
    """The first `train` rows, the `val` after them, and the `test` after those."""
    edges = (0, train, train + val, train + val + test)
    if len(inputs) < edges[-1]:
        raise JelError(f"a small task needs {edges[-1]} rows of data and has {len(inputs)}")
    parts = [Split(inputs[a:b].contiguous(), targets[a:b].contiguous()) for a, b in zip(edges, edges[1:])]
    return parts[0], parts[1], parts[2]


# -----------------------------------------------------------------------------
# made up


def quadratic(size: int, noise: float, generator: torch.Generator) -> Splits:
    """Noise around the minimum at 0: the targets are 0, the inputs what is taken from the parameters."""
    x = torch.randn(4096, size, generator=generator) * noise
    return split(x, torch.zeros_like(x), 3584, 128, 384)


def tabular(
    n_train: int, features: int, classes: int, label_noise: float, margin: float, rank: int, generator: torch.Generator
) -> Splits:
    """Rows of correlated features, labelled by a random network of one hidden layer; some labels are drawn at random.

    `margin`: how much of the labelling is linear, in [0, 1]; `rank`: how many factors the features mix.
    """
    n = n_train + 128 + 512
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x = draw(n, rank) @ draw(rank, features) / rank**0.5 + 0.3 * draw(n, features)
    x = (x - x.mean(0)) / x.std(0)
    hidden = torch.tanh(2 * x @ draw(features, 16) / features**0.5) @ draw(16, classes)
    scores = margin * 4 * x @ draw(features, classes) / features**0.5 + (1 - margin) * hidden
    labels = (scores + 0.2 * draw(n, classes)).argmax(1)
    random = torch.randint(classes, (n,), generator=generator)
    noisy = torch.rand(n, generator=generator) < label_noise
    return split(x, torch.where(noisy, random, labels), n_train, 128, 512)


def regression(n_train: int, features: int, outputs: int, noise: float, generator: torch.Generator) -> Splits:
    """A random network's outputs, standardised, and noise."""
    n = n_train + 128 + 512
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    x = draw(n, features)
    y = torch.tanh(2 * x @ draw(features, 24) / features**0.5) @ draw(24, outputs)
    y = (y - y.mean(0)) / y.std(0)
    return split(x, y + noise * draw(n, outputs), n_train, 128, 512)


def ratings(users: int, items: int, n_train: int, noise: float, clicks: bool, generator: torch.Generator) -> Splits:
    """(user, item) pairs and what the user thinks of it, from 4 hidden factors: a rating, or a click."""
    n = n_train + 256 + 1024
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    pairs = torch.stack([torch.randint(m, (n,), generator=generator) for m in (users, items)], 1)
    likes = (draw(users, 4)[pairs[:, 0]] * draw(items, 4)[pairs[:, 1]]).sum(1) / 2 + draw(items)[pairs[:, 1]] / 2
    likes = (likes + noise * draw(n))[:, None]
    return split(pairs, (likes > 0).float() if clicks else likes, n_train, 256, 1024)


def algorithm(name: str, length: int, generator: torch.Generator) -> tuple[Splits, int, int]:
    """Sequences and what an algorithm answers at every place: splits, size of the input and of the output alphabet."""
    n = 6000 + 64 + 256
    if name == "parity":  # of the bits so far
        x = torch.randint(2, (n, length), generator=generator)
        return split(x, x.cumsum(1) % 2, 6000, 64, 256), 2, 2
    if name == "addition":  # of two binary numbers, lowest digit first
        a, b = (torch.randint(2, (n, length), generator=generator) for _ in range(2))
        carry, digits = torch.zeros(n, dtype=torch.long), []
        for i in range(length):
            total = a[:, i] + b[:, i] + carry
            digits.append(total % 2)
            carry = total // 2
        return split(2 * a + b, torch.stack(digits, 1), 6000, 64, 256), 4, 2
    if name == "echo":  # what came three places before; before that nothing is asked
        x = torch.randint(8, (n, length), generator=generator)
        y = torch.cat([torch.full((n, 3), -1), x[:, :-3]], 1)
        return split(x, y, 6000, 64, 256), 8, 8
    if name == "maximum":  # the largest so far
        x = torch.randint(8, (n, length), generator=generator)
        return split(x, x.cummax(1).values, 6000, 64, 256), 8, 8
    raise JelError(f"unknown algorithm {name!r}")


# -----------------------------------------------------------------------------
# text: Python's standard library


@lru_cache(1)
def text() -> tuple[Tensor, str]:
    """Character ids (N,), and the sha256 of the text that they are made of."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join((folder / name).read_bytes() for name in SOURCES if (folder / name).is_file())
    if len(data) < 100_000:
        raise JelError(f"the source of Python's standard library is not in {folder}: the text tasks need it")
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    counts = torch.bincount(raw, minlength=256)
    ids = torch.full((256,), VOCABULARY - 1)
    ids[counts.argsort(descending=True, stable=True)[: VOCABULARY - 1]] = torch.arange(VOCABULARY - 1)
    return ids[raw], hashlib.sha256(data).hexdigest()


def windows(length: int, n_train: int, n_val: int, n_test: int, generator: torch.Generator) -> Tensor:
    """Stretches of the text (N, length): training from its first four fifths, validation and test from the rest."""
    ids, _ = text()
    edge = len(ids) * 4 // 5
    at = [
        torch.randint(0, edge - length, (n_train,), generator=generator),
        torch.randint(edge, len(ids) - length, (n_val + n_test,), generator=generator),
    ]
    return ids[torch.cat(at)[:, None] + torch.arange(length)]


def next_character(context: int, n_train: int, generator: torch.Generator) -> Splits:
    x = windows(context + 1, n_train, 256, 1024, generator)
    return split(x[:, :-1], x[:, -1], n_train, 256, 1024)


def next_characters(length: int, n_train: int, generator: torch.Generator) -> Splits:
    x = windows(length + 1, n_train, 32, 128, generator)
    return split(x[:, :-1], x[:, 1:], n_train, 32, 128)


# -----------------------------------------------------------------------------
# scikit-learn's own data sets, an optional import


@lru_cache(8)
def shipped(name: str) -> tuple[Tensor, Tensor]:
    """Inputs (N, D), standardised, and classes (N,) of digits, breast_cancer, wine or iris.

    Raises `JelError` if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise JelError("this task's data comes with scikit-learn: pip install scikit-learn") from None
    data = getattr(datasets, f"load_{name}")()
    x = torch.tensor(data.data, dtype=torch.float32)
    x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    return x, torch.tensor(data.target).long()


def shuffled(name: str, n_train: int, n_val: int, n_test: int, generator: torch.Generator) -> Splits:
    x, y = shipped(name)
    order = torch.randperm(len(x), generator=generator)
    return split(x[order], y[order], n_train, n_val, n_test)
