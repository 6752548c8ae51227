"""Parts that the tests of jel share: small policies, random masks, and a task that costs nothing.

E episodes, K decisions, A knobs.
"""

from __future__ import annotations

import torch

from jel import GaussianPolicy, Knob

E, K, A = 6, 12, 2
NAN, INF = float("nan"), float("inf")
FEEDBACK = ("progress", "log_probe_loss")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def knobs(action_range: float = 100.0) -> tuple[Knob, Knob]:
    """The paper's two, within other bounds."""
    bounds = (1 / action_range, action_range)
    return Knob("lr", "lr", bounds=bounds), Knob("weight_decay", "weight_decay", bounds=bounds)


def lively_policy(seed: int = 1, **architecture) -> GaussianPolicy:
    """A fresh policy's outputs hardly depend on the state; these do."""
    policy = GaussianPolicy(seed=seed, **architecture)
    with torch.no_grad():
        policy.net[4].weight *= 50
    return policy


def feedback_policy(seed: int = 0, **architecture) -> GaussianPolicy:
    """It reads the probe loss and acts on it visibly."""
    return lively_policy(seed, features=FEEDBACK, **architecture)


def random_alive(seed: int) -> torch.Tensor:
    """(E, K): episodes that die at random decisions, one at once, one never."""
    lengths = torch.randint(1, K + 1, (E, 1), generator=generator(seed))
    lengths[0], lengths[1] = 0, K
    return torch.arange(K) < lengths


def sampled(policy: GaussianPolicy, states: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions (..., A) drawn by the policy in these states, and their log-densities (...)."""
    return policy.act(states, torch.randn(*states.shape[:-1], policy.n_actions, generator=generator(seed)))


def same(a: GaussianPolicy, b: GaussianPolicy) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class QuadraticTask:
    """Gradient descent on a quadratic from a random start: the probe loss is the quadratic itself, above `floor`."""

    groups = ("x",)

    def __init__(self, steps: int = 23, floor: float = 0.0):
        self.steps, self.floor = steps, floor
        self.slots: dict[int, torch.Tensor] = {}

    def num_steps(self, group):
        return self.steps

    def reset(self, group, episodes):
        starts = torch.randn(64, generator=generator(group))
        self.x = starts[episodes.start : episodes.stop].clone()

    def train(self, first_step, steps, multipliers):
        own = multipliers["*"]
        for _ in range(steps):
            self.x = self.x - 0.02 * own["lr"] * self.x - 0.001 * own.get("weight_decay", 1.0)

    def observe(self, names):
        known = {
            "probe_loss": self.x.square() + self.floor,
            "train_loss": self.x.square() / 2,
            "grad_norm": self.x.abs(),
        }
        return {name: known[name] for name in names}

    def save(self, slot, episodes):
        self.slots[slot] = torch.where(episodes, self.x, self.slots.get(slot, self.x))

    def load(self, slot, episodes):
        self.x = torch.where(episodes, self.slots[slot], self.x)

    def close(self):
        pass
