"""AdamW and Muon against slow twins and their properties; MuonAdamW's groups, state and errors.

K members of a stack, R runs, rows x cols = out x in of a matrix.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn as nn

from nanochat import optim_sharding
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import POLAR_EXPRESS, MuonAdamW, adamw_update, muon_update, orthogonalize

F64 = torch.float64
SHAPES = [(12, 5), (5, 12), (8, 8), (1, 32)]  # tall, wide, square, and the gate of a single kv head


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# -----------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torch(weight_decay):
    p = randn(7, 3)
    twin = nn.Parameter(p.clone())
    reference = torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=weight_decay)
    exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 8):
        twin.grad = randn(7, 3, seed=step)
        reference.step()
        bias = 1 - 0.8**step, 1 - 0.95**step
        adamw_update(p, twin.grad, exp_avg, exp_avg_sq, 0.01, weight_decay, 0.8, 0.95, 1e-10, *bias)
        torch.testing.assert_close(p, twin.data, rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# Muon


def slow_muon(p, grad, buf, second, lr, wd, mu, beta2):
    """One step on one matrix -> (p, buf, second), by the definition; `second` is (rows,) or (cols,)."""
    rows, cols = p.shape
    buf = mu * buf + (1 - mu) * grad  # Nesterov momentum as an EMA
    x = mu * buf + (1 - mu) * grad
    x = x / (1.02 * x.square().sum().sqrt() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    second = beta2 * second + (1 - beta2) * x.square().mean(1 if rows >= cols else 0)
    scaled = x / second.sqrt()[:, None] if rows >= cols else x / second.sqrt()[None, :]
    update = scaled * (x.norm() / scaled.norm())  # the matrix keeps its norm
    decay = torch.where(update * p >= 0, wd * p, 0.0)  # cautious: only where both agree in sign
    return p - lr * math.sqrt(max(1, rows / cols)) * (update + decay), buf, second


def muon_state(rows, cols, K=3):
    """Parameters and zero state of a stack of K."""
    return (
        randn(K, rows, cols),
        torch.zeros(K, rows, cols, dtype=F64),
        torch.zeros(K, *((rows, 1) if rows >= cols else (1, cols)), dtype=F64),
    )


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_muon_equals_its_slow_twin(rows, cols):
    p, buf, second = muon_state(rows, cols)
    twins = [(p[k].clone(), torch.zeros(rows, cols), torch.zeros(max(rows, cols))) for k in range(3)]
    for step in range(1, 6):
        grad = randn(3, rows, cols, seed=step)
        hyper = 0.02 * step, 0.3, 0.85 + 0.01 * step, 0.95
        twins = [slow_muon(q, g, b, s, *hyper) for (q, b, s), g in zip(twins, grad.clone())]
        muon_update(p, grad, buf, second, *hyper)
        torch.testing.assert_close(p, torch.stack([q for q, _, _ in twins]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows, cols", [(64, 16), (16, 64), (32, 32)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_vectors(rows, cols):
    x = randn(4, rows, cols)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    inside = U.mT @ orthogonalize(x) @ Vh.mT  # diagonal if the singular vectors are kept
    values = inside.diagonal(dim1=-2, dim2=-1)
    clear = S / x.norm(dim=(-2, -1))[:, None] > 0.01  # five steps cannot lift what is nearly zero
    assert clear.float().mean() > 0.9 and values[clear].min() > 0.6 and values[clear].max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype, atol", [(F64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rows, cols", [*SHAPES, (16, 64), (64, 16)])
@pytest.mark.parametrize("rank", [1, 5, 64])
def test_orthogonalize_is_five_polar_express_steps(rows, cols, rank, dtype, atol):
    """Whatever the rank: a Gram matrix has the smaller singular values squared, and rounding must not drown them."""
    x = randn(4, rows, rank) @ torch.diag(0.5 ** torch.arange(rank, dtype=F64)) @ randn(4, rank, cols, seed=1)
    twin = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = twin @ twin.mT
        twin = a * twin + (b * gram + c * gram @ gram) @ twin
    torch.testing.assert_close(orthogonalize(x.to(dtype)), twin.to(dtype), rtol=0, atol=atol)


def test_orthogonalize_forgets_the_scale_and_leaves_zero_alone():
    x = randn(2, 6, 4)
    torch.testing.assert_close(orthogonalize(1e3 * x), orthogonalize(x), rtol=1e-5, atol=1e-5)
    assert not orthogonalize(torch.zeros(1, 6, 4)).any()


@pytest.mark.parametrize("rows, cols", SHAPES)
def test_muon_keeps_the_norm_and_scales_the_rate_with_the_shape(rows, cols):
    """From p = 0 the step is lr x sqrt(max(1, rows / cols)) x a matrix of the orthogonalised gradient's norm."""
    for step in range(3):
        p, buf, second = muon_state(rows, cols)
        second.uniform_(0.1, 2.0)
        grad, p = randn(3, rows, cols, seed=step), torch.zeros_like(p)
        want = orthogonalize(grad * (1 - 0.9**2)).norm(dim=(1, 2)) * 0.5 * max(1, rows / cols) ** 0.5
        muon_update(p, grad, buf, second, 0.5, 0.0, 0.9, 0.95)
        torch.testing.assert_close(p.norm(dim=(1, 2)), want, rtol=1e-9, atol=0)


def test_muon_decays_only_where_update_and_parameter_agree():
    lr, wd, after = 0.1, 0.4, {}
    for decay in (0.0, wd):
        p, buf, second = muon_state(12, 3)
        muon_update(p, randn(3, 12, 3, seed=5), buf, second, lr, decay, 0.9, 0.95)
        after[decay] = p
    before = muon_state(12, 3)[0]
    agree = (before - after[0.0]) * before >= 0  # the update is what is subtracted
    assert 0.2 < agree.double().mean() < 0.8
    torch.testing.assert_close(after[0.0] - after[wd], agree * before * lr * wd * math.sqrt(12 / 3), rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# MuonAdamW


def make(seed: int = 0, runs: int | None = None, **hyper) -> MuonAdamW:
    """Two AdamW tensors and a Muon stack of two; with `runs`, each parameter has a leading axis."""
    shared = {"lr": 0.05, "weight_decay": 0.1, **hyper}
    lead, shapes = () if runs is None else (runs,), [(9, 4), (3,), (6, 4), (6, 4)]
    params = [nn.Parameter(randn(*lead, *shape, seed=seed + i)) for i, shape in enumerate(shapes)]
    return MuonAdamW(
        [
            {"name": "tables", "kind": "adamw", "params": params[:2], "betas": (0.8, 0.95), "eps": 1e-10, **shared},
            {"name": "matrices", "kind": "muon", "params": params[2:], "momentum": 0.9, "beta2": 0.95, **shared},
        ]
    )


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, *steps):
    """A step each, with gradients that depend on the step and on the parameters."""
    for step in steps:
        for i, p in enumerate(params_of(optimizer)):
            p.grad = randn(*p.shape, seed=100 * step + i) + p.detach()
        optimizer.step()


def assert_same(a, b):
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("as_on_cuda", [True, False])
def test_a_decision_never_recompiles(monkeypatch, as_on_cuda):
    """Compiled updates take hyperparameters as 0-D tensors; with floats (`as_on_cuda` False) each decision compiles."""
    from torch._dynamo.utils import counters

    if as_on_cuda:
        monkeypatch.setattr(optim_sharding, "_scalar", lambda value, like: torch.full((), float(value)))
    torch._dynamo.reset()
    monkeypatch.setattr(optim_sharding.AdamWShard, "_one_pass", None)  # what a CPU does without compiling
    optimizer, programs = make(), []
    for group in optimizer.param_groups[:1]:
        group["params"][:] = [nn.Parameter(p.detach().bfloat16()) for p in group["params"]]  # as embeddings are on CUDA
    optimizer._compiled = {
        name: torch.compile(f, backend="eager", dynamic=False, fullgraph=True)
        for name, f in (("adamw", adamw_update), ("muon", muon_update))
    }
    with torch._dynamo.config.patch(recompile_limit=64):
        for decision in range(12):
            for group in optimizer.param_groups:
                group.update(lr=0.01 * (1 + decision), weight_decay=0.1 / (1 + decision))
                if "momentum" in group:
                    group["momentum"] = 0.85 + 0.01 * decision
            for p in params_of(optimizer):
                p.grad = torch.ones_like(p)
            optimizer.step()
            programs.append(counters["stats"]["unique_graphs"])
    assert (programs[1] == programs[-1]) == as_on_cuda


def test_state_dict_resumes_exactly():
    straight, first, second = make(), make(), make(seed=50)
    train(straight, 0, 1, 2, 3, 4, 5)
    train(first, 0, 1, 2)
    for p, q in zip(params_of(second), params_of(first)):
        p.data.copy_(q)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 3, 4, 5)
    assert_same(straight, second)


def test_state_dict_is_a_copy():
    optimizer = make()
    train(optimizer, 0)
    state = optimizer.state_dict()
    before = state["matrices"]["momentum_buffer"].clone()
    train(optimizer, 1)
    assert state["tables"]["step"] == 1 and torch.equal(state["matrices"]["momentum_buffer"], before)


def test_reset_is_as_new():
    used, new = make(), make()
    train(used, 0, 1)
    used.reset()
    for p, q in zip(params_of(used), params_of(new)):
        p.data.copy_(q)
    train(used, 5, 6)
    train(new, 5, 6)
    assert_same(used, new)


def test_closure_is_called_once_with_gradients_enabled():
    optimizer, calls = make(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params_of(optimizer))
        loss.backward()
        return loss

    before = [p.detach().clone() for p in params_of(optimizer)]
    assert optimizer.step(closure).item() == pytest.approx(sum(b.square().sum().item() for b in before))
    assert calls == [True] and not any(torch.equal(b, p) for b, p in zip(before, params_of(optimizer)))


RATES, DECAYS = [0.01, 0.05, 0.2], [0.0, 0.1, 2.0]


@pytest.mark.parametrize("lr, wd", [(RATES, DECAYS), (RATES, [0.1] * 3), (RATES, 0.1), (0.05, DECAYS), (0.05, 0.1)])
def test_rates_per_run_equal_single_runs(lr, wd):
    """R runs in one optimizer, each rate a tensor (R,) or 0-D, = R optimizers of one run with floats."""
    lrs, wds = (value if isinstance(value, list) else [value] * 3 for value in (lr, wd))
    singles = [make(seed=10 * r, lr=lrs[r], weight_decay=wds[r]) for r in range(3)]
    groups = copy.deepcopy(make().param_groups)
    for i, group in enumerate(groups):
        group["params"] = [nn.Parameter(torch.stack(ps)) for ps in zip(*(s.param_groups[i]["params"] for s in singles))]
        group.update(lr=torch.tensor(lr, dtype=F64), weight_decay=torch.tensor(wd, dtype=F64))
    together = MuonAdamW(groups)
    for step in range(3):
        for s, single in enumerate(singles):
            train(single, 10 * step + s)
        for p, alone in zip(params_of(together), zip(*map(params_of, singles)), strict=True):
            p.grad = torch.stack([q.grad for q in alone])
        together.step()
    for p, alone in zip(params_of(together), zip(*map(params_of, singles))):
        torch.testing.assert_close(p.data, torch.stack(alone).data, rtol=0, atol=1e-12)


@pytest.mark.parametrize("runs", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tensor_rates_filled_in_place_are_floats_set_anew(runs, dtype):
    """0-D or (R,) tensors that stay in the groups and are filled before every step = new values in the groups."""
    shape = () if runs is None else (runs,)
    filled, anew = make(runs=runs), make(runs=runs)
    for group in filled.param_groups:
        group.update(lr=torch.zeros(shape, dtype=dtype), weight_decay=torch.zeros(shape, dtype=dtype))
    tensors = [(group["lr"], group["weight_decay"]) for group in filled.param_groups]
    for step in range(4):
        for i, ((lr, wd), group) in enumerate(zip(tensors, anew.param_groups)):
            lr.copy_((0.01 + 0.1 * step + i) * torch.arange(1, 1 + lr.numel()).view(shape))
            wd.fill_(0.3 / (1 + step))
            group.update(lr=lr.item() if runs is None else lr.clone(), weight_decay=wd.clone())
        train(filled, step)
        train(anew, step)
        assert_same(filled, anew)
        for group, (lr, wd) in zip(filled.param_groups, tensors):
            assert group["lr"] is lr and group["weight_decay"] is wd


def test_bf16_weights_have_fp32_moments_and_rates():
    """Two runs of a bf16 weight with a tensor of rates = each with its rate as a float; bf16 would be 0.4% off."""
    rates, weight, grad = [0.3017, 0.1003], randn(2, 1000).bfloat16(), randn(2, 1000, seed=1).bfloat16()
    adamw = {"name": "w", "kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    moved = []
    for lr, part in [(torch.tensor(rates), slice(None)), (rates[0], slice(1)), (rates[1], slice(1, 2))]:
        p = nn.Parameter(weight[part].clone())
        optimizer = MuonAdamW([{"params": [p], "lr": lr, **adamw}])
        p.grad = grad[part].clone()
        optimizer.step()
        assert optimizer.state_dict()["w"]["exp_avg.0"].dtype == torch.float32
        moved.append(p.detach())
    assert (moved[0] == torch.cat(moved[1:])).float().mean() > 0.999


def test_parameters_stay_views_of_one_stack():
    """Loading weights or state must not part them from the stack that the step updates."""
    optimizer = make()
    module = nn.ParameterList(params_of(optimizer))
    train(optimizer, 0)
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    a, b = optimizer.param_groups[1]["params"]
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and b.storage_offset() == a.numel()
    before = a.detach().clone(), b.detach().clone()
    train(optimizer, 1)
    assert not torch.equal(before[0], a) and not torch.equal(before[1], b)


@pytest.mark.parametrize("depth", [6, 12])
def test_groups_are_those_of_the_design(depth):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, vocab_size=256))
    optimizer, width, scale = model.setup_optimizer(weight_decay=0.2), 64 * depth, (64 * depth / 768) ** -0.5
    heads = width // 128
    muon = {"kind": "muon", "lr": 0.02, "weight_decay": 0.2, "beta2": 0.95}
    adamw = {"kind": "adamw", "betas": (0.8, 0.95), "weight_decay": 0.0, "eps": 1e-10}
    want = {
        "lm_head": (1, {**adamw, "lr": 0.004 * scale}),
        "wte": (1, {**adamw, "lr": 0.3 * scale}),
        "value_embeds": (depth // 2, {**adamw, "lr": 0.3 * scale}),
        "resid_lambdas": (1, {**adamw, "lr": 0.005}),
        "x0_lambdas": (1, {**adamw, "lr": 0.5, "betas": (0.96, 0.95)}),
        f"muon_{heads}x32": (depth // 2, muon),
        f"muon_{width}x{width}": (4 * depth, muon),
        f"muon_{4 * width}x{width}": (depth, muon),
        f"muon_{width}x{4 * width}": (depth, muon),
    }
    found = {g["name"]: g for g in optimizer.param_groups}
    assert found.keys() == want.keys() and (depth != 12 or scale == 1.0)
    for name, (tensors, hyper) in want.items():
        assert len(found[name]["params"]) == tensors, name
        for key, value in hyper.items():
            assert found[name][key] == (pytest.approx(value) if isinstance(value, float) else value), (name, key)
        initial = found[name]["initial_lr"], found[name]["initial_wd"]
        assert initial == (found[name]["lr"], found[name]["weight_decay"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "sgd"}, "kind"),
        ({"name": None}, "name"),
        ({"name": "tables"}, "name of its own"),
        ({"params": [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]}, "mixes shapes"),
    ],
)
def test_groups_that_cannot_be(change, message):
    groups = copy.deepcopy(make().param_groups)
    groups[1].update(change)
    with pytest.raises(ValueError, match=message):
        MuonAdamW(groups)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("tables"),
        lambda s: s["tables"].pop("exp_avg.1"),
        lambda s: s["matrices"].update(extra=torch.zeros(1)),
        lambda s: s["tables"].update({"exp_avg.0": torch.zeros(8, 4)}),
        lambda s: s["matrices"].update(momentum_buffer=torch.zeros(1, 6, 4)),  # of a model with fewer layers
        lambda s: s["matrices"].update(momentum_buffer=torch.zeros(3, 6, 4)),
    ],
)
def test_state_that_does_not_fit(damage):
    optimizer = make()
    state = optimizer.state_dict()
    damage(state)
    with pytest.raises(ValueError, match="optimizer state"):
        optimizer.load_state_dict(state)
