"""Networks whose weights are one flat vector an episode, and whose products are batched over episodes.

Shapes: E episodes, B batch, D features, H width, C classes, L sequence length, V vocabulary, P parameters. Data comes
as (E or 1, B, ...); outputs are (E, B, ...). `Model.forward` takes the tensors of `layout`, each with a leading E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
}


@dataclass(frozen=True)
class Model:
    """`layout`: (shape, standard deviation, mean) of each tensor at the start."""

    layout: tuple[tuple[tuple[int, ...], float, float], ...]
    forward: Callable[[list[Tensor], Tensor], Tensor]

    @property
    def n_params(self) -> int:
        return sum(math.prod(shape) for shape, _, _ in self.layout)

    def start(self, generator: torch.Generator) -> Tensor:
        """Random initial parameters (P,)."""
        noise = torch.randn(self.n_params, generator=generator)
        sizes = [math.prod(shape) for shape, _, _ in self.layout]
        std = torch.cat([torch.full((n,), s) for n, (_, s, _) in zip(sizes, self.layout)])
        mean = torch.cat([torch.full((n,), m) for n, (_, _, m) in zip(sizes, self.layout)])
        return mean + std * noise

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """(E, P) -> the tensors of the layout, each (E, *shape)."""
        parts = flat.split([math.prod(shape) for shape, _, _ in self.layout], dim=1)
        return [part.unflatten(1, shape) for part, (shape, _, _) in zip(parts, self.layout)]


Layout = list[tuple[tuple[int, ...], float, float]]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(E or 1, N, D), (E, D, H), (E, H) -> (E, N, H)."""
    return torch.baddbmm(bias[:, None], x.expand(weight.shape[0], -1, -1), weight)


def dense(d: int, h: int, gain: float = 1.0) -> Layout:
    return [((d, h), gain * d**-0.5, 0.0), ((h,), 0.0, 0.0)]


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """ids (E or 1, ...), table (E, V, H) -> (E, ..., H)."""
    e, v, h = table.shape
    offset = torch.arange(e).mul(v).view(e, *[1] * (ids.ndim - 1))
    return F.embedding(ids + offset, table.reshape(e * v, h))


def layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x (E, ..., H), gain (E, H)."""
    return F.layer_norm(x, x.shape[-1:]) * gain.view(gain.shape[0], *[1] * (x.ndim - 2), -1)


def _chain(tensors: Sequence[Tensor], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    for i in range(0, len(tensors), 2):
        x = linear(x, tensors[i], tensors[i + 1])
        if i + 2 < len(tensors):
            x = act(x)
    return x


def mlp(sizes: Sequence[int], activation: str) -> Model:
    """x (., B, D) -> (E, B, C)."""
    act, gain = ACTIVATIONS[activation], math.sqrt(2) if activation in ("relu", "gelu", "elu") else 1.0
    layout: Layout = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:])):
        layout += dense(a, b, gain if i < len(sizes) - 2 else 1.0)
    return Model(tuple(layout), lambda t, x: _chain(t, x, act))


def point(size: int, eigenvalues: Tensor) -> Model:
    """The noisy quadratic's parameters, each near 1 at the start: x (., B, D) -> sqrt(eigenvalue) (theta - x)."""
    return Model((((size,), 1.0, 0.0),), lambda t, x: eigenvalues.sqrt() * (t[0][:, None] - x))


def context_mlp(vocabulary: int, context: int, width: int, hidden: Sequence[int], activation: str) -> Model:
    """A language model of fixed context: ids (., B, context) -> (E, B, V)."""
    act = ACTIVATIONS[activation]
    sizes = (context * width, *hidden, vocabulary)
    layout: Layout = [((vocabulary, width), 1.0, 0.0)]
    for a, b in zip(sizes[:-1], sizes[1:]):
        layout += dense(a, b)
    return Model(tuple(layout), lambda t, x: _chain(t[1:], embed(x, t[0]).flatten(2), act))


def recommender(users: int, items: int, width: int, hidden: int) -> Model:
    """Two embeddings, their product and a small MLP, as in NeuMF: ids (., B, 2) -> logit or rating (E, B, 1)."""
    layout = [
        ((users, width), 0.3, 0.0),
        ((items, width), 0.3, 0.0),
        *dense(2 * width, hidden),
        *dense(hidden + width, 1),
    ]

    def forward(t: list[Tensor], x: Tensor) -> Tensor:
        u, i = embed(x[..., 0], t[0]), embed(x[..., 1], t[1])  # (E, B, width)
        h = torch.relu(linear(torch.cat([u, i], -1), t[2], t[3]))
        return linear(torch.cat([h, u * i], -1), t[4], t[5])

    return Model(tuple(layout), forward)


def recurrent(cell: str, vocabulary: int, width: int, hidden: int, classes: int) -> Model:
    """RNN, LSTM or GRU over embedded ids (., B, L) -> outputs at every place (E, B, L, C)."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
    layout = [
        ((vocabulary, width), 1.0, 0.0),
        ((width, gates * hidden), width**-0.5, 0.0),
        ((hidden, gates * hidden), hidden**-0.5, 0.0),
        ((gates * hidden,), 0.0, 0.0),
        *dense(hidden, classes),
    ]
    step = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}[cell]

    def forward(t: list[Tensor], x: Tensor) -> Tensor:
        table, w, u, b, out, out_b = t
        e, (n, length) = table.shape[0], x.shape[1:]
        projected = linear(embed(x, table).flatten(1, 2), w, b).view(e, n, length, -1)  # (E, B, L, gates H)
        h = c = table.new_zeros(e, n, hidden)
        hidden_states = []
        for at in projected.unbind(2):
            h, c = step(at, h, c, u)
            hidden_states.append(h)
        flat = torch.stack(hidden_states, 2).flatten(1, 2)
        return linear(flat, out, out_b).view(e, n, length, -1)

    return Model(tuple(layout), forward)


def _rnn(at: Tensor, h: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(torch.baddbmm(at, h, u)), c


def _lstm(at: Tensor, h: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    keep, write, read, new = torch.baddbmm(at, h, u).chunk(4, -1)
    c = torch.sigmoid(keep + 1) * c + torch.sigmoid(write) * torch.tanh(new)
    return torch.sigmoid(read) * torch.tanh(c), c


def _gru(at: Tensor, h: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    inputs, recur = at.chunk(3, -1), torch.bmm(h, u).chunk(3, -1)
    update, reset = torch.sigmoid(inputs[0] + recur[0]), torch.sigmoid(inputs[1] + recur[1])
    new = torch.tanh(inputs[2] + reset * recur[2])
    return update * h + (1 - update) * new, c


def cnn(side: int, channels: Sequence[int], classes: int, activation: str) -> Model:
    """3 x 3 convolutions, stride 2 from the second on, and a linear head: images (., B, side, side) -> (E, B, C)."""
    act = ACTIVATIONS[activation]
    layout: Layout = []
    for a, b in zip((1, *channels[:-1]), channels):
        layout += dense(9 * a, b, math.sqrt(2))
    small = side
    for _ in channels[1:]:
        small = (small + 1) // 2
    layout += dense(small * small * channels[-1], classes)

    def forward(t: list[Tensor], x: Tensor) -> Tensor:
        e, n = t[0].shape[0], x.shape[1]
        x = x.expand(e, -1, -1, -1).flatten(0, 1)[:, None]  # (E B, 1, side, side)
        for i in range(len(channels)):
            stride = 1 if i == 0 else 2
            patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)  # (E B, places, 9 a)
            places = patches.shape[1]
            y = act(linear(patches.reshape(e, n * places, -1), t[2 * i], t[2 * i + 1]))
            size = math.isqrt(places)
            x = y.view(e * n, places, -1).transpose(1, 2).unflatten(2, (size, size))
        return linear(x.reshape(e, n, -1), t[-2], t[-1])

    return Model(tuple(layout), forward)


def transformer(vocabulary: int, length: int, width: int, heads: int, layers: int) -> Model:
    """A causal pre-norm transformer: ids (., B, L) -> (E, B, L, V)."""
    layout: Layout = [((vocabulary, width), 0.5, 0.0), ((length, width), 0.1, 0.0)]
    residual = (2 * layers) ** -0.5
    for _ in range(layers):
        layout += [((width,), 0.0, 1.0), *dense(width, 3 * width), *dense(width, width, residual)]
        layout += [((width,), 0.0, 1.0), *dense(width, 4 * width), *dense(4 * width, width, residual)]
    layout += [((width,), 0.0, 1.0), *dense(width, vocabulary, 0.5)]

    def forward(t: list[Tensor], x: Tensor) -> Tensor:
        e, (n, length) = t[0].shape[0], x.shape[1:]
        h = embed(x, t[0]) + t[1][:, None, :length]  # (E, B, L, H)
        wide = lambda y, w, b: linear(y.flatten(1, 2), w, b).view(e, n, length, -1)
        for i in range(layers):
            g1, wqkv, bqkv, wo, bo, g2, w1, b1, w2, b2 = t[2 + 10 * i : 12 + 10 * i]
            qkv = wide(layer_norm(h, g1), wqkv, bqkv).view(e * n, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
            h = h + wide(mixed.transpose(1, 2).reshape(e, n, length, width), wo, bo)
            h = h + wide(F.gelu(wide(layer_norm(h, g2), w1, b1)), w2, b2)
        return wide(layer_norm(h, t[-3]), t[-2], t[-1])

    return Model(tuple(layout), forward)


# -----------------------------------------------------------------------------
# losses: outputs (E, B, ...) and targets (E or 1, B, ...) -> (E,)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Classes on the last axis; a target of -1 does not count."""
    targets = targets.expand(outputs.shape[:-1])
    picked = outputs.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    counts = targets >= 0
    return -(picked * counts).flatten(1).sum(1) / counts.flatten(1).sum(1).clamp_min(1)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().flatten(1).mean(1)


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.smooth_l1_loss(outputs, targets.expand_as(outputs), reduction="none").flatten(1).mean(1)


def one_hot_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared distance from the one-hot target."""
    return squared(outputs, F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype))


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets.expand_as(outputs), reduction="none").flatten(1).mean(1)


LOSSES = {f.__name__: f for f in (cross_entropy, squared, absolute, huber, one_hot_squared, logistic)}
