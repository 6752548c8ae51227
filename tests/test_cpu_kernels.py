"""The hand-written forms against the plain ones; PyTorch's fused AdamW against ours; the allocator.

T time, H heads, D head dim, C channels, R runs.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from nanochat import cpu_kernels as pointwise
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, adamw_update


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def tables(T, H, D):
    angle = torch.rand(T, 1, D // 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64).expand(
        T, H, D // 2
    )
    return angle.cos(), angle.sin()


PARTS = {
    "norm": ("norm", randn(3, 5, 8)),
    "norm, strided": ("norm", randn(3, 8, 5).mT),
    "rotary_norm": ("rotary_norm", randn(2, 5, 3, 8), *tables(5, 3, 8)),
    "rotary_norm, strided": ("rotary_norm", randn(2, 5, 4, 8)[..., :3, :], *tables(5, 3, 8)),
    "mlp": ("mlp", randn(7, 4), randn(16, 4, seed=1), randn(4, 16, seed=2)),
    "mlp, runs": ("mlp", randn(3, 7, 4), randn(3, 16, 4, seed=1), randn(3, 4, 16, seed=2)),
    "mix": ("mix", randn(2, 5, 4), randn(2, 5, 4, seed=1), randn(1, 1, 1, seed=2), randn(1, 1, 1, seed=3)),
    "mix, runs": (
        "mix",
        randn(3, 2, 5, 4),
        randn(3, 2, 5, 4, seed=1),
        randn(3, 1, 1, 1, seed=2),
        randn(3, 1, 1, 1, seed=3),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_by_hand_is_plain(part):
    name, *arguments = PARTS[part]
    differentiated = [a for a in arguments if a.requires_grad]
    results = []
    for f in (getattr(pointwise, name), getattr(pointwise, f"plain_{name}")):
        y = f(*arguments)
        results.append((y, *torch.autograd.grad(y, differentiated, randn(*y.shape, seed=5))))
    assert (
        type(results[0][0].grad_fn).__name__
        == f"_{''.join(w.capitalize() for w in name.split('_')).replace('Mlp', 'MLP')}Backward"
    )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_arguments_are_left_alone(part):
    """A part works in place only on what it has made itself, forward and backward."""
    name, *arguments = PARTS[part]
    before = [a.detach().clone() for a in arguments]
    y = getattr(pointwise, name)(*arguments)
    grad = randn(*y.shape, seed=5).detach()
    kept = grad.clone()
    differentiated = [a for a in arguments if a.requires_grad]
    first, second = (torch.autograd.grad(y, differentiated, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before))


def test_bf16_takes_the_plain_form():
    x = randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(pointwise.norm(x), pointwise.plain_norm(x)) and not pointwise.by_hand(x)


def test_parts_keep_the_type_of_what_they_are_given(monkeypatch):
    """Under CUDA's autocast `rms_norm` returns fp32, and the scalars of `mix` are fp32."""
    monkeypatch.setattr(pointwise.F, "rms_norm", lambda x, shape, eager=pointwise.F.rms_norm: eager(x, shape).float())
    x, scalar = torch.randn(2, 4, 3, 8, dtype=torch.bfloat16), torch.tensor(1.001).view(1, 1, 1)
    cos, sin = torch.randn(2, 4, 3, 4)
    assert (
        pointwise.norm(x).dtype
        == pointwise.rotary_norm(x, cos, sin).dtype
        == pointwise.mix(x, x, scalar, scalar).dtype
        == x.dtype
    )


def test_compiled_model_is_the_eager_one():
    """Compiled, every part is plain: one graph, the same losses and gradients."""
    config = GPTConfig(sequence_len=8, vocab_size=70, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model, data = GPT(config).double(), torch.randint(70, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    model.init_weights(torch.Generator().manual_seed(1))
    results = []
    for f in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = f(*data)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# the optimizer's fast paths


@pytest.mark.parametrize(
    "rates", [0.03, torch.tensor(0.03), torch.tensor([0.03, 0.2, 0.001])], ids=["float", "0-D", "per run"]
)
def test_fused_adamw_is_ours(rates):
    p = nn.Parameter(randn(3, 4, 5).detach())
    twin, averages = p.detach().clone(), [torch.zeros(3, 4, 5, dtype=torch.float64) for _ in range(2)]
    group = {
        "name": "w",
        "kind": "adamw",
        "params": [p],
        "betas": (0.8, 0.95),
        "eps": 1e-10,
        "lr": rates,
        "weight_decay": 0.3,
    }
    optimizer = MuonAdamW([group])
    rates = torch.as_tensor(rates, dtype=torch.float64).expand(3).view(3, 1, 1)
    for step in range(1, 5):
        grad = randn(3, 5, 4, seed=step).detach().mT  # strided, as a product's gradient may be
        p.grad = grad
        optimizer.step()
        adamw_update(twin, grad, *averages, rates, 0.3, 0.8, 0.95, 1e-10, 1 - 0.8**step, 1 - 0.95**step)
        torch.testing.assert_close(p.data, twin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 50, 1 << 20], ids=["a matrix at a time", "ragged", "all at once"])
def test_portions_of_a_muon_stack_change_nothing(elements, monkeypatch):
    monkeypatch.setattr("nanochat.optim_sharding.CACHE_ELEMENTS", elements)
    params = [nn.Parameter(randn(2, 6, 4, seed=i).detach()) for i in range(3)]
    group = {
        "name": "m",
        "kind": "muon",
        "momentum": 0.9,
        "beta2": 0.95,
        "lr": torch.tensor([0.1, 0.02]),
        "weight_decay": 0.5,
    }
    alone = [
        MuonAdamW([{**group, "lr": float(lr), "params": [nn.Parameter(p.detach()[r].clone()) for p in params]}])
        for r, lr in enumerate(group["lr"])
    ]
    together = MuonAdamW([{**group, "params": params}])
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = randn(2, 6, 4, seed=10 * step + i).detach()
            for r, optimizer in enumerate(alone):
                optimizer.param_groups[0]["params"][i].grad = p.grad[r].clone()
        for optimizer in (together, *alone):
            optimizer.step()
    for i, p in enumerate(params):
        want = torch.stack([optimizer.param_groups[0]["params"][i].data for optimizer in alone])
        torch.testing.assert_close(p.data, want, rtol=0, atol=1e-10)


# -----------------------------------------------------------------------------
# the allocator

FAULTS = """
import resource, sys, torch
from nanochat.common import init_compute
if sys.argv[1] == "kept":
    init_compute("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(20)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_kept():
    """40 MB repeatedly: by default 10,240 page faults each time (in huge pages 20), none once freed memory is kept."""
    kept, default = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
        )
        for how in ("kept", "default")
    )
    assert kept < 10 and default >= 20
