"""Kinds of small tasks: what is drawn at random, and which kinds are held out.

A task is a `Spec`, JSON values: its kind and all that was drawn for it, so that the same task can be built again.
`HELD_OUT` is declared here, before anything was trained: no policy is trained on these kinds and nothing is chosen
by them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from jel.tasks.small import data, models
from jel.tasks.small.episodes import DEFAULTS, Episodes, SmallTask, Split

TRAINING = (
    "quadratic",
    "sequence",
    "digits",
    "autoencoder",
    "tabular",
    "regression",
    "context",
    "recommend",
    "finetune",
    "overfit",
    "rescaled",
    "uneven",
)
HELD_OUT = ("cnn", "gru", "transformer", "breast_cancer", "wine")

Spec = dict[str, Any]


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def log_integer(rng: random.Random, low: int, high: int) -> int:
    return round(log_uniform(rng, low, high))


def draw(kind: str, seed: int) -> Spec:
    """A task of the kind. Depth, width, batch, length, loss, activation and data are drawn from the seed."""
    rng = random.Random(f"{kind}/{seed}")
    spec: Spec = {
        "kind": kind,
        "seed": seed,
        "steps": log_integer(rng, 60, 160),
        "batch": rng.choice([8, 16, 16, 32]),
        # half of the training tasks have other units of their weights, so that no one rate suits them all
        "scale": log_uniform(rng, 0.1, 10) if kind in TRAINING and rng.random() < 0.5 else 1.0,
        "activation": rng.choice(list(models.ACTIVATIONS)),
        "hidden": [log_integer(rng, 12, 64)] * rng.randint(1, 3),
    }
    return {**spec, **DRAWS[kind](rng)}


def _few(rng: random.Random) -> int:
    return log_integer(rng, 40, 400)


DRAWS = {
    "quadratic": lambda r: {
        "size": log_integer(r, 10, 300),
        "condition": log_uniform(r, 100, 30_000),
        "noise": log_uniform(r, 0.1, 3),
        "batch": r.choice([1, 2, 4]),
    },
    "sequence": lambda r: {
        "cell": r.choice(["rnn", "lstm"]),
        "algorithm": r.choice(["parity", "addition", "echo", "maximum"]),
        "length": r.randint(4, 7),
        "width": log_integer(r, 12, 32),
        "batch": r.choice([8, 16]),
        "steps": log_integer(r, 60, 120),
    },
    "digits": lambda r: {
        "n_train": r.choice([100, 300, 1200]),
        "loss": r.choice(["cross_entropy", "cross_entropy", "one_hot_squared"]),
    },
    "autoencoder": lambda r: {"hidden": [log_integer(r, 8, 48)], "loss": r.choice(["squared", "huber"])},
    "tabular": lambda r: {
        "n_train": _few(r),
        "features": log_integer(r, 5, 40),
        "classes": r.randint(2, 5),
        "label_noise": r.choice([0.0, 0.05, 0.1, 0.3]),
        "margin": r.choice([0.2, 0.6, 1.0]),
        "rank": r.randint(3, 12),
    },
    "regression": lambda r: {
        "n_train": r.choice([80, 300, 2000]),
        "features": log_integer(r, 3, 20),
        "outputs": r.randint(1, 3),
        "noise": r.choice([0.05, 0.3, 1.0]),
        "loss": r.choice(["squared", "absolute", "huber"]),
    },
    "context": lambda r: {
        "n_train": r.choice([800, 20_000, 20_000]),
        "context": r.randint(2, 6),
        "width": log_integer(r, 6, 16),
        "hidden": [log_integer(r, 16, 48)] * r.randint(1, 2),
    },
    "recommend": lambda r: {
        "users": log_integer(r, 40, 200),
        "items": log_integer(r, 30, 100),
        "n_train": r.choice([800, 3000, 8000]),
        "noise": r.choice([0.3, 1.0]),
        "clicks": r.random() < 0.5,
        "width": log_integer(r, 4, 16),
    },
    "finetune": lambda r: {
        "n_train": _few(r),
        "features": log_integer(r, 5, 30),
        "classes": r.randint(2, 5),
        "label_noise": r.choice([0.05, 0.2]),
        "margin": r.choice([0.2, 0.6]),
        "rank": r.randint(3, 12),
        "scale": log_uniform(r, 0.5, 5),
    },
    "overfit": lambda r: {
        "n_train": log_integer(r, 30, 160),
        "features": log_integer(r, 8, 40),
        "classes": r.randint(2, 3),
        "label_noise": r.choice([0.0, 0.05, 0.1]),
        "margin": r.choice([0.6, 1.0]),
        "rank": r.randint(3, 10),
        "hidden": [log_integer(r, 24, 96)] * r.randint(1, 3),
        "steps": log_integer(r, 120, 240),
    },
    # some other kind's task whose weights have such units that it wants small rates
    "rescaled": lambda r: {
        "base": draw(r.choice(["digits", "regression", "context", "tabular", "recommend"]), r.randrange(1000, 2000)),
        "scale": log_uniform(r, 5, 50),
    },
    # some other kind's task each of whose tensors has units of its own: no one rate suits them all
    "uneven": lambda r: {
        "base": draw(r.choice(["digits", "context", "sequence", "recommend", "autoencoder"]), r.randrange(2000, 3000)),
        "scale": log_uniform(r, 0.03, 0.3),
        "spread": log_uniform(r, 3, 30),
    },
    # held out
    "cnn": lambda r: {
        "channels": r.choice([[8, 8], [6, 12], [6, 6, 12]]),
        "batch": r.choice([8, 16]),
        "steps": log_integer(r, 80, 140),
    },
    "gru": lambda r: {
        "algorithm": r.choice(["addition", "echo", "text"]),
        "length": r.randint(6, 9),
        "width": log_integer(r, 16, 40),
        "batch": 8,
        "steps": log_integer(r, 90, 160),
    },
    "transformer": lambda r: {
        "length": 12,
        "width": r.choice([24, 32]),
        "layers": r.randint(1, 2),
        "batch": 8,
        "steps": log_integer(r, 100, 160),
    },
    "breast_cancer": lambda r: {"steps": log_integer(r, 80, 200)},
    "wine": lambda r: {"steps": log_integer(r, 80, 200)},
}


@lru_cache(512)
def _built(key: str) -> SmallTask:
    spec = json.loads(key)
    generator = torch.Generator().manual_seed(spec["seed"] + 7919 * sum(map(ord, spec["kind"])))
    return BUILDERS[spec["kind"]](spec, generator)


def build(spec: Spec) -> SmallTask:
    """The task that the spec describes; kept, so that a second call costs nothing."""
    return _built(json.dumps(spec, sort_keys=True))


def _task(s: Spec, model: models.Model, loss: str, splits: data.Splits) -> SmallTask:
    return SmallTask(model, loss, s["steps"], s["batch"], *splits, scale=s["scale"])


def _quadratic(s: Spec, g: torch.Generator) -> SmallTask:
    eigenvalues = s["condition"] ** -torch.linspace(0, 1, s["size"])
    model = models.point(s["size"], eigenvalues / eigenvalues.mean())
    return _task(s, model, "squared", data.quadratic(s["size"], s["noise"], g))


def _sequence(s: Spec, g: torch.Generator) -> SmallTask:
    if s["algorithm"] == "text":
        splits, inputs, outputs = data.next_characters(s["length"], 4000, g), data.VOCABULARY, data.VOCABULARY
    else:
        splits, inputs, outputs = data.algorithm(s["algorithm"], s["length"], g)
    model = models.recurrent(s["cell"], inputs, max(8, s["width"] // 2), s["width"], outputs)
    return _task(s, model, "cross_entropy", splits)


def _digits(s: Spec, g: torch.Generator) -> SmallTask:
    model = models.mlp([64, *s["hidden"], 10], s["activation"])
    return _task(s, model, s["loss"], data.shuffled("digits", s["n_train"], 128, 384, g))


def _autoencoder(s: Spec, g: torch.Generator) -> SmallTask:
    splits = [Split(part.inputs, part.inputs) for part in data.shuffled("digits", 1200, 128, 384, g)]
    model = models.mlp([64, *s["hidden"], 64], s["activation"])
    return _task(s, model, s["loss"], (splits[0], splits[1], splits[2]))


def _labelling(s: Spec) -> dict[str, Any]:
    return {name: s[name] for name in ("features", "classes", "label_noise", "margin", "rank")}


def _tabular(s: Spec, g: torch.Generator) -> SmallTask:
    splits = data.tabular(s["n_train"], **_labelling(s), generator=g)
    model = models.mlp([s["features"], *s["hidden"], s["classes"]], s["activation"])
    return _task(s, model, "cross_entropy", splits)


def _rescaled(s: Spec, g: torch.Generator) -> SmallTask:
    return replace(build(s["base"]), scale=s["scale"])


def _uneven(s: Spec, g: torch.Generator) -> SmallTask:
    """The scale of a tensor is between `scale` and `scale` times `spread`."""
    base = build(s["base"])
    sizes = [math.prod(shape) for shape, _, _ in base.model.layout]
    parts = s["scale"] * s["spread"] ** torch.rand(len(sizes), generator=g)
    return replace(base, scale=torch.cat([x.expand(n) for x, n in zip(parts, sizes)]))


def _finetune(s: Spec, g: torch.Generator) -> SmallTask:
    """The start is a network trained on much data of the same labelling; what follows has few, noisier rows."""
    many = data.tabular(s["n_train"] + 2000, **_labelling(s), generator=g)
    model = models.mlp([s["features"], *s["hidden"], s["classes"]], s["activation"])
    taught = Episodes(SmallTask(model, "cross_entropy", 150, 64, *many), [s["seed"]], measure=False)
    taught.train(150, torch.tensor([[1e-2, *DEFAULTS[1:]]]))
    few = Split(many[0].inputs[: s["n_train"]], many[0].targets[: s["n_train"]])
    task = _task(s, model, "cross_entropy", (few, many[1], many[2]))
    return replace(task, pretrained=taught.flat[0])


def _regression(s: Spec, g: torch.Generator) -> SmallTask:
    model = models.mlp([s["features"], *s["hidden"], s["outputs"]], s["activation"])
    splits = data.regression(s["n_train"], s["features"], s["outputs"], s["noise"], g)
    return _task(s, model, s["loss"], splits)


def _context(s: Spec, g: torch.Generator) -> SmallTask:
    model = models.context_mlp(data.VOCABULARY, s["context"], s["width"], s["hidden"], s["activation"])
    return _task(s, model, "cross_entropy", data.next_character(s["context"], s["n_train"], g))


def _recommend(s: Spec, g: torch.Generator) -> SmallTask:
    splits = data.ratings(s["users"], s["items"], s["n_train"], s["noise"], s["clicks"], g)
    model = models.recommender(s["users"], s["items"], s["width"], 16)
    return _task(s, model, "logistic" if s["clicks"] else "squared", splits)


def _cnn(s: Spec, g: torch.Generator) -> SmallTask:
    splits = [Split(p.inputs.unflatten(1, (8, 8)), p.targets) for p in data.shuffled("digits", 1200, 128, 384, g)]
    return _task(
        s, models.cnn(8, s["channels"], 10, s["activation"]), "cross_entropy", (splits[0], splits[1], splits[2])
    )


def _gru(s: Spec, g: torch.Generator) -> SmallTask:
    return _sequence({**s, "cell": "gru"}, g)


def _transformer(s: Spec, g: torch.Generator) -> SmallTask:
    model = models.transformer(data.VOCABULARY, s["length"], s["width"], 4, s["layers"])
    return _task(s, model, "cross_entropy", data.next_characters(s["length"], 4000, g))


def _real_tabular(s: Spec, g: torch.Generator) -> SmallTask:
    x, y = data.shipped(s["kind"])
    n_val, n_test = len(x) // 5, len(x) * 3 // 10
    splits = data.shuffled(s["kind"], len(x) - n_val - n_test, n_val, n_test, g)
    return _task(s, models.mlp([x.shape[1], *s["hidden"], int(y.max()) + 1], s["activation"]), "cross_entropy", splits)


BUILDERS = {
    "quadratic": _quadratic,
    "sequence": _sequence,
    "digits": _digits,
    "autoencoder": _autoencoder,
    "tabular": _tabular,
    "regression": _regression,
    "context": _context,
    "recommend": _recommend,
    "finetune": _finetune,
    "overfit": _tabular,
    "rescaled": _rescaled,
    "uneven": _uneven,
    "cnn": _cnn,
    "gru": _gru,
    "transformer": _transformer,
    "breast_cancer": _real_tabular,
    "wine": _real_tabular,
}
