"""The examples of "lhopt" run on small stand-ins for their data, under a policy that was never trained."""

from __future__ import annotations

import os
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from jel.policy_lstm import save_lhopt_policy
from jel.recipes.lhopt import LhoptRecipe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What an example prints."""
    save_lhopt_policy(LhoptRecipe(hidden=8).policy(0), tmp_path / "policy", {}, decisions=5)

    def run_example(name: str, *flags) -> str:
        words = [name, *map(str, flags), "--policy", str(tmp_path / "policy.json")]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_an_unseen_model(run):
    printed = run("lhopt.py", "--steps", 20)
    plain, watched = (float(line.split()[-1]) for line in printed.splitlines())
    assert 0 < watched < 2 and plain != watched


def test_text(run, tmp_path):
    draw = random.Random(0)
    for part, n in (("train", 1200), ("valid", 300)):
        lines = [" ".join(draw.choice("the cat sat on a mat and ran".split()) for _ in range(9)) for _ in range(n // 9)]
        (tmp_path / f"wiki.{part}.tokens").write_text("\n".join(lines))
    small = ("--length", 16, "--width", 16, "--layers", 1, "--heads", 2, "--batch", 4, "--vocabulary", 6)
    printed = run("lhopt_text.py", tmp_path, *small, "--device", "cpu")
    lines = printed.splitlines()[1:]
    first, last = (float(line.split("perplexity")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert len(lines) == 5 and lines[-1].startswith("end")  # a look at each decision after the first, and the end
    assert last < first < 10


@pytest.fixture
def images():
    """40 noisy images of 32 x 32, the red channel bright in one class and the blue one in the other."""
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 2
    pixels = generator.integers(0, 80, (40, 3, 32, 32), dtype=np.uint8)
    pixels[labels == 0, 0] += 150
    pixels[labels == 1, 2] += 150
    return labels.astype(np.uint8), pixels


def test_cifar(run, tmp_path, images):
    labels, pixels = images
    records = np.concatenate([labels[:, None], pixels.reshape(40, -1)], axis=1)
    records[:20].tofile(tmp_path / "data_batch_1.bin")
    records[:20].tofile(tmp_path / "data_batch_2.bin")
    records[20:].tofile(tmp_path / "test_batch.bin")
    printed = run(
        "lhopt_images.py", tmp_path, "--epochs", 3, "--batch", 10, "--width", 4, "--workers", 0, "--device", "cpu"
    )
    assert "40 images, 12 steps" in printed
    assert printed.count("epoch") == 3 and "accuracy" in printed


def test_folders_of_pictures(run, tmp_path, images):
    pytest.importorskip("PIL")
    from PIL import Image

    for i, (label, pixels) in enumerate(zip(*images)):
        folder = tmp_path / ("train" if i < 20 else "val") / f"n0{label}"
        os.makedirs(folder, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{i}.jpg")
    flags = ("--epochs", 1, "--batch", 10, "--width", 4, "--size", 24, "--workers", 0, "--device", "cpu")
    assert "20 images, 2 steps" in run("lhopt_images.py", tmp_path, *flags)
