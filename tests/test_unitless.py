"""Statistics without units, their historical CDFs, and the features of a decision."""

import math

import torch

from jel.unitless import (
    END_WEIGHTS,
    INNER,
    STATISTICS,
    SUMS,
    cosine_cdf,
    feature_names,
    historical_cdf,
    inner_statistics,
    new_memory,
    observe,
    standard_normal_cdf,
)

KNOBS = ("lr", "weight_decay")


def sums_of(g, m, p, d):
    dot = lambda a, b: (a * b).sum(-1)
    n = float(g.shape[-1])
    values = [dot(g, g), dot(m, m), dot(p, p), dot(d, d), dot(g, m), dot(g, p), dot(g, d), d.abs().sum(-1)]
    return dict(zip(SUMS, [*values, torch.tensor(n), torch.tensor(0.0), torch.tensor(n)]))


def vectors(*shape):
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


def test_statistics_are_what_their_names_say():
    g, m, p, d = vectors(50)
    x = dict(zip(INNER, inner_statistics(sums_of(g, m, p, d)).tolist()))
    close = lambda a, b: math.isclose(a, float(b), abs_tol=1e-4)
    cos = torch.nn.functional.cosine_similarity
    assert close(x["log_update_ratio"], d.norm().log() - p.norm().log())
    assert close(x["log_noise_scale"], m.norm().log() - (m - g).norm().log())
    assert close(x["cos_grad_momentum"], cos(g, m, dim=0))
    assert close(x["phi_grad_param"], torch.special.ndtr(cos(g, p, dim=0) * 50**0.5))
    p_update = torch.special.ndtr(cos(g, d, dim=0) * 50**0.5)
    assert close(x["logit_grad_update"], torch.logit(p_update))
    assert close(x["log_update_spread"], d.abs().mean().log() - d.square().mean().sqrt().log())


def test_statistics_have_no_units():
    """Other units of loss (the gradient and its average), or of parameters, change nothing."""
    g, m, p, d = vectors(3, 200)
    x = inner_statistics(sums_of(g, m, p, d))
    torch.testing.assert_close(inner_statistics(sums_of(7 * g, 7 * m, p, d)), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inner_statistics(sums_of(g / 5, m / 5, 5 * p, 5 * d)), x, rtol=1e-4, atol=1e-4)


def test_no_momentum_and_blown_up_runs_read_as_zero():
    g, m, p, d = vectors(40)
    none = dict(zip(INNER, inner_statistics(sums_of(g, 0 * m, p, d)).tolist()))
    assert none["log_momentum_ratio"] == none["log_noise_scale"] == none["cos_grad_momentum"] == 0
    assert inner_statistics(sums_of(g * math.inf, m, p, d * math.nan)).isfinite().all()


def test_random_directions_have_uniform_cdfs():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 4000, 500, generator=generator)
    p = cosine_cdf(torch.nn.functional.cosine_similarity(a, b), torch.tensor(500.0)).sort().values
    assert (p - torch.linspace(0, 1, 4000)).abs().max() < 0.04  # Kolmogorov-Smirnov, far from its limit


def slow_cdf(history: list[float], k: float) -> float:
    """The past weighted step by step, and Phi of where its last value stands."""
    weights = [1.0]
    for t in range(2, len(history) + 1):
        a = k / (t + k - 1)
        weights = [w * (1 - a) for w in weights] + [a]
    mean = sum(w * x for w, x in zip(weights, history))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, history))
    return float(standard_normal_cdf(torch.tensor((history[-1] - mean) / max(variance**0.5, 1e-4))))


def test_historical_cdf_is_its_slow_twin():
    history = torch.randn(12, generator=torch.Generator().manual_seed(2)).tolist()
    k = torch.tensor(END_WEIGHTS)
    mean = var = torch.zeros(1, len(k))
    for t, x in enumerate(history, 1):
        p, mean, var = historical_cdf(torch.tensor([x]), mean, var, torch.tensor([float(t)]), k)
        for i, weight in enumerate(END_WEIGHTS):
            assert abs(p[0, i].item() - slow_cdf(history[:t], weight)) < 1e-4


def decision(memory, k, shape=(), scale=1.0, **changes):
    g, m, p, d = torch.randn(4, *shape, 30, generator=torch.Generator().manual_seed(k))
    loss = scale * torch.full(shape, 2.0 / (k + 1))
    given = {
        "progress": torch.tensor(k / 5),
        "inner": None if k == 0 else inner_statistics(sums_of(g, m, p, d)),
        "train_loss": loss if k else loss * math.nan,
        "val_loss": 1.5 * loss,
        "param_norm": p.norm(dim=-1),
        "outer_update": d.norm(dim=-1),
        "path": 2 * d.norm(dim=-1),
        "relative": torch.zeros(*shape, 2),
        "last_move": torch.zeros(*shape, 2),
    }
    return observe(memory, **{**given, **changes})


def test_features_have_names_and_the_units_of_the_loss_do_not_show():
    names = feature_names(KNOBS)
    ours, other = new_memory(), new_memory()
    for k in range(4):
        x, ours = decision(ours, k)
        y, other = decision(other, k, scale=300.0)
        assert x.shape == (len(names),) and x.isfinite().all()
        torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-3)
    seen = dict(zip(names, x.tolist()))
    assert seen["progress"] == torch.tensor(0.6) and seen["train_drop"] > 0 and seen["val_above_best"] == 0
    assert abs(seen["log_straightness"] + math.log(2)) < 1e-5


def test_episodes_side_by_side_are_as_alone():
    together, alone = new_memory((3,)), new_memory()
    for k in range(4):
        g = torch.Generator().manual_seed(k)
        loss = torch.rand(3, generator=g) + 0.5
        x, together = decision(together, k, (3,), train_loss=loss, val_loss=loss)
        full = {name: torch.randn(4, 3, 30, generator=torch.Generator().manual_seed(k)) for name in ("v",)}["v"]
        parts = full[:, 1]
        inner = None if k == 0 else inner_statistics(sums_of(*parts))
        y, alone = decision(
            alone,
            k,
            (),
            inner=inner,
            train_loss=loss[1],
            val_loss=loss[1],
            param_norm=parts[2].norm(),
            outer_update=parts[3].norm(),
            path=2 * parts[3].norm(),
        )
        torch.testing.assert_close(x[1], y, atol=1e-5, rtol=1e-5)


def test_an_unknown_loss_leaves_its_history_alone():
    names, memory = feature_names(KNOBS), new_memory()
    for k in range(3):
        _, memory = decision(memory, k)
    at = STATISTICS.index("log_val_loss")
    x, after = decision(memory, 3, val_loss=torch.tensor(math.nan))
    seen = dict(zip(names, x.tolist()))
    assert seen["val_unknown"] == 1 and seen["val_drop"] == 0 and seen["log_val_loss_cdf_5"] == 0.5
    assert torch.equal(after["mean"][at], memory["mean"][at]) and after["last_val"] == memory["last_val"]
    x, _ = decision(memory, 3, train_loss=torch.tensor(math.inf))
    assert dict(zip(names, x.tolist()))["train_unknown"] == 1 and x.isfinite().all()
