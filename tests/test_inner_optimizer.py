"""LHOPT's inner optimizer against a slow twin, AdamW, and its own promises."""

from __future__ import annotations

import io
import random

import pytest
import torch
from torch import nn

from jel.errors import JelError
from jel.inner_optimizer import InnerOptimizer
from tests.no_wait import NoWait

SHAPES = ((4, 3), (5,), (2, 3, 2), ())
WIDE = torch.float64
NUMBERS = {"lr": 1e-3, "weight_decay": 1e-2, "eps": 1e-6, "clip": 0.8, "clip_decay": 1e-2, "norm_decay": 0.05}
ADAMW = {"clip": None, "denominator": "rms", "decay": "decoupled", "trust_power": 0.0}


def parameters(seed=0, dtype=WIDE):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=WIDE).to(dtype)) for s in SHAPES]


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=WIDE)).to(p.dtype)


def random_numbers(seed):
    """The paper's eight drawn anew, as a controller might leave them."""
    draw = random.Random(seed)
    spread = {name: default * 10 ** draw.uniform(-1, 1) for name, default in NUMBERS.items()}
    return {**spread, "clip": draw.uniform(0.1, 0.9), "betas": (draw.uniform(0, 0.99), draw.uniform(0.5, 0.999))}


# -----------------------------------------------------------------------------
# slow twin: one parameter at a time, plain floats for everything that is one number


class SlowTwin:
    def __init__(self, params, rms, decoupled, trust_power, trust_vectors, clipping):
        self.params, self.rms, self.decoupled, self.power = params, rms, decoupled, trust_power
        self.vectors, self.clipping, self.largest = trust_vectors, clipping, 0.0
        self.kept = [{"m": p * 0, "v": p * 0, "c1": 0.0, "c2": 0.0, "c3": 0.0, "n": 0.0} for p in params]

    @torch.no_grad()
    def step(self, numbers):
        lr, wd, eps, clip, clip_decay, o3 = (numbers[name] for name in NUMBERS)
        o1, o2 = (1 - beta for beta in numbers["betas"])
        norm = sum(p.grad.square().sum().item() for p in self.params) ** 0.5
        self.largest = max(norm, self.largest * (1 - clip_decay))
        factor = min(1.0, clip * self.largest / norm) if self.clipping else 1.0
        for p, s in zip(self.params, self.kept):
            g = p.grad * factor
            s["m"] = (1 - o1) * s["m"] + o1 * g
            s["v"] = (1 - o2) * s["v"] + o2 * g**2 if self.rms else torch.maximum((1 - o2) * s["v"], g.abs())
            s["c1"], s["c2"] = s["c1"] + o1 * (1 - s["c1"]), s["c2"] + o2 * (1 - s["c2"])
            below = (s["v"] / s["c2"]).sqrt() if self.rms else s["v"]
            u = s["m"] / s["c1"] / (below + eps) + (0 if self.decoupled else wd * p)
            ratio = 1.0
            if self.power and (self.vectors or p.dim() > 1):
                s["c3"], s["n"] = s["c3"] + o3 * (1 - s["c3"]), s["n"] + o3 * (u.norm().item() - s["n"])
                if p.norm() >= 1e-8 and u.norm() >= 1e-8:
                    ratio = max(p.norm().item() / (s["n"] / s["c3"]), 1e-3) ** self.power
            p.mul_(1 - lr * wd if self.decoupled else 1.0).sub_(lr * ratio * u)


FLAGS = {
    "paper": {},
    "rms": {"denominator": "rms"},
    "decoupled": {"decay": "decoupled"},
    "no trust ratio": {"trust_power": 0.0},
    "half a trust ratio, vectors too": {"trust_power": 0.5, "trust_vectors": True},
    "no clipping": {"clip": None},
    "AdamW": ADAMW,
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_equals_its_slow_twin_while_all_numbers_change(flags):
    params, slow = parameters(), parameters()
    optimizer = InnerOptimizer(params, **flags)
    group = optimizer.param_groups[0]
    rest = group["denominator"] == "rms", group["decay"] == "decoupled", group["trust_power"], group["trust_vectors"]
    twin = SlowTwin(slow, *rest, clipping=group["clip"] is not None)
    for step in range(12):
        numbers = random_numbers(step)
        group.update({k: v for k, v in numbers.items() if k != "clip" or group["clip"] is not None})
        for both in params, slow:
            give_gradients(both, step, scale=10.0 if step == 5 else 1.0)
        optimizer.step()
        twin.step(numbers)
        for p, q in zip(params, slow):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_with_its_parts_off_it_is_adamw():
    params, theirs = parameters(), parameters()
    optimizer = InnerOptimizer(params, 0.01, weight_decay=0.1, eps=1e-8, betas=(0.9, 0.999), **ADAMW)
    reference = torch.optim.AdamW(theirs, 0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(10):
        give_gradients(params, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for p, q in zip(params, theirs):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_bias_corrections_stay_right_when_betas_change():
    """Under a constant gradient Adam's update is its sign, whatever the betas were; AdamW's own is not."""

    def updates(optimizer, p):
        found = []
        for step in range(40):
            optimizer.param_groups[0]["betas"] = (0.9, 0.9 if step < 20 else 0.9999)
            before = p.detach().clone()
            p.grad = torch.full_like(p, 3.0)
            optimizer.step()
            found.append((before - p.detach()) / 0.01)
        return torch.stack(found)

    p = nn.Parameter(torch.zeros(3, dtype=WIDE))
    ours = InnerOptimizer([p], 0.01, weight_decay=0.0, eps=1e-12, **ADAMW)
    torch.testing.assert_close(updates(ours, p), torch.ones(40, 3, dtype=WIDE), rtol=1e-9, atol=1e-9)

    q = nn.Parameter(torch.zeros(3, dtype=WIDE))
    theirs = torch.optim.AdamW([q], 0.01, weight_decay=0.0)
    assert (updates(theirs, q) - 1).abs().max() > 0.5


def test_the_gradient_is_held_to_a_fraction_of_its_rolling_maximum():
    """With beta1 = 0 the momentum is the clipped gradient."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=WIDE))
    optimizer = InnerOptimizer([p], betas=(0.0, 0.99), clip=0.5, clip_decay=0.1)
    largest = 0.0
    for norm in (4.0, 1.0, 3.0, 0.5, 8.0):
        p.grad = torch.full_like(p, norm / 2)
        optimizer.step()
        largest = max(norm, 0.9 * largest)
        assert optimizer.state[p]["momentum"].norm().item() == pytest.approx(min(norm, 0.5 * largest))
        assert bool(optimizer.state[p]["clipped"]) == (norm > 0.5 * largest)


def test_the_norm_that_clips_is_that_of_all_groups():
    a, b = (nn.Parameter(torch.zeros(2, 2, dtype=WIDE)) for _ in range(2))
    optimizer = InnerOptimizer([{"params": [a]}, {"params": [b], "clip": None}], betas=(0.0, 0.99), clip=0.5)
    a.grad, b.grad = torch.full_like(a, 1.5), torch.full_like(b, 2.0)
    optimizer.step()  # norms 3 and 4, so 5 together, clipped to 2.5
    assert optimizer.state[a]["momentum"].norm().item() == pytest.approx(1.5)
    assert optimizer.state[b]["momentum"].norm().item() == pytest.approx(4.0)


def test_a_step_moves_a_matrix_by_the_rate_times_its_norm():
    """The trust ratio in one line: |step| = lr * |weights| for matrices when the update norm is not smoothed."""
    params = parameters()
    optimizer = InnerOptimizer(params, 0.01, norm_decay=1.0)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        give_gradients(params, step)
        optimizer.step()
        for p, q in zip(params, before):
            if p.dim() > 1:
                assert (p - q).norm().item() == pytest.approx(0.01 * q.norm().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, ADAMW], ids=["paper", "AdamW"])
def test_state_dict_round_trips(dtype, flags):
    """Train 8 = train 4, save, load into a new optimizer, train 4: bit for bit, and fp32 state beside bf16 weights."""

    def train(optimizer, params, steps):
        for step in steps:
            give_gradients(params, step)
            optimizer.param_groups[0]["betas"] = (0.9, 1 - 0.5 / (1 + step))
            optimizer.step()

    whole, first = parameters(dtype=dtype), parameters(dtype=dtype)
    train(InnerOptimizer(whole, **flags), whole, range(8))
    optimizer = InnerOptimizer(first, **flags)
    train(optimizer, first, range(4))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = InnerOptimizer(second, lr=7.0, **flags)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(t.dtype == torch.float32 for state in resumed.state.values() for t in state.values())
    train(resumed, second, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(whole, second))


def test_bf16_weights_get_the_step_of_fp32_ones():
    narrow, wide = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in wide]
    for params in narrow, wide:
        give_gradients(narrow, 0)
        for p, q in zip(params, narrow):
            p.grad = q.grad.to(p.dtype)
        InnerOptimizer(params, 0.1).step()
    for p, q in zip(narrow, wide):
        torch.testing.assert_close(p, q.bfloat16(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("flags", [{}, ADAMW], ids=["paper", "AdamW"])
def test_tensors_filled_in_place_are_floats_set_anew_and_nothing_waits(flags):
    params, others = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    # on a CPU, and only there, torch reads a tensor that is added to a list of tensors: eps stays a float here
    names = [name for name in NUMBERS if name not in (*flags, "eps")]
    betas = torch.zeros(()), torch.zeros(())
    optimizer = InnerOptimizer(params, betas=betas, **{name: torch.zeros(()) for name in names}, **flags)
    plain = InnerOptimizer(others, **flags)
    for step in range(5):
        numbers = random_numbers(step)
        for name in names:
            optimizer.param_groups[0][name].fill_(numbers[name])
            plain.param_groups[0][name] = numbers[name]
        for held, value in zip(betas, numbers["betas"]):
            held.fill_(value)
        plain.param_groups[0]["betas"] = numbers["betas"]
        optimizer.param_groups[0]["eps"] = plain.param_groups[0]["eps"] = numbers["eps"]
        give_gradients(params, step)
        give_gradients(others, step)
        with NoWait():
            optimizer.step()
            plain.step()
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_parameter_without_a_gradient_is_left_out():
    params = parameters()
    optimizer = InnerOptimizer(params)
    give_gradients(params, 0)
    optimizer.step()
    before, state = params[0].detach().clone(), {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    params[0].grad = None
    params[3].grad = None
    params[1].grad *= 0.1
    optimizer.step()
    assert torch.equal(params[0], before)
    kept = optimizer.state[params[0]]
    assert all(torch.equal(kept[k], state[k]) for k in ("momentum", "denominator", "averages"))
    optimizer.zero_grad()
    optimizer.step()


def test_closure_is_called_with_gradients_enabled():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = InnerOptimizer([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert (p < 1).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip": 1.5}, "clip is 1.5"),
        ({"betas": (0.9, "0.99")}, "beta2 is '0.99'"),
        ({"betas": 0.9}, "betas are 0.9"),
        ({"denominator": "mean"}, "denominator is 'mean'"),
        ({"decay": True}, "decay is True"),
    ],
)
def test_numbers_that_cannot_be(change, message):
    with pytest.raises(JelError, match=message):
        InnerOptimizer(parameters(), **change)
    optimizer = InnerOptimizer(parameters())
    with pytest.raises(JelError, match=message):
        optimizer.add_param_group({"params": parameters(1), **change})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = InnerOptimizer([other, embedding.weight])
    (embedding(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(JelError, match="sparse"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.state


@pytest.mark.parametrize("read", [float, bool, torch.Tensor.item, torch.Tensor.nonzero])
def test_no_wait_refuses_what_waits(read):
    with pytest.raises(AssertionError, match="the host would wait"), NoWait():
        read(torch.ones(()))
