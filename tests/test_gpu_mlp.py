"""The fused relu^2 MLP against the plain form, on a GPU or in Triton's interpreter.

R runs, N tokens, C width, F hidden width.
"""

from __future__ import annotations

import pytest
import torch

from nanochat.cpu_kernels import plain_mlp
from nanochat.gpt import GPT, GPTConfig
from nanochat.mlp_kernel import mlp

pytest.importorskip("triton", reason="triton is not installed (it comes with pip install -e .[dev] on Linux)")
from nanochat import gpu_mlp  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter, see conftest.py
CLOSE = 1e-6 if DEVICE == "cpu" else 1e-4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several programs, the last one for part of a block."""
    monkeypatch.setattr(gpu_mlp, "BLOCK", 64)


def draw(*lead, N=7, C=8, F=20, dtype=torch.float32):
    g = torch.Generator().manual_seed(len(lead))
    x, up, down, grad = (torch.randn(*lead, *s, generator=g) for s in ((N, C), (F, C), (C, F), (N, C)))
    return [t.to(DEVICE).requires_grad_() for t in (x.to(dtype), up, down)], grad.to(DEVICE, dtype)


def relative(a, b):
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_the_fused_mlp_is_the_plain_one(lead):
    inputs, grad = draw(*lead)
    wanted, found = plain_mlp(*inputs), mlp(*inputs, "triton")
    assert found.shape == wanted.shape and relative(found, wanted) < CLOSE
    pairs = zip(*(torch.autograd.grad(y, inputs, grad) for y in (found, wanted)), inputs)
    assert all(relative(a, b) < CLOSE and a.dtype == t.dtype for a, b, t in pairs)


def rounding_launch(kernel, *tensors):
    """`gpu_mlp._launch` in PyTorch's operations, which round to bf16 as a GPU does; Triton's interpreter cuts off."""
    if kernel is gpu_mlp.relu_squared:
        tensors[0].copy_(tensors[0].float().relu() ** 2)
    else:
        y, grad = tensors
        grad.copy_(2 * y.float().sqrt() * grad.float())


@pytest.mark.parametrize("rounding", [True, False])
def test_in_bf16_it_is_as_right_as_the_plain_one(rounding, monkeypatch):
    """Against the plain form in fp32 of the same bf16 numbers; relu(h) as a root of bf16 is hardly less right."""
    inputs, grad = draw(N=64, C=32, F=128, dtype=torch.bfloat16)
    if rounding:
        monkeypatch.setattr(gpu_mlp, "_launch", rounding_launch)
    exact = [t.detach().bfloat16().float().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(plain_mlp(*exact), exact, grad.float())
    errors = {}
    for name in ("plain", "triton"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = plain_mlp(*inputs) if name == "plain" else mlp(*inputs, name)
        grads = torch.autograd.grad(y, inputs, grad)
        assert y.dtype == grads[0].dtype == torch.bfloat16 and grads[1].dtype == grads[2].dtype == torch.float32
        errors[name] = [relative(a, b) for a, b in zip(grads, wanted)]
    most = 1.1 if rounding or DEVICE == "cuda" else 2.0
    assert all(t < most * p for p, t in zip(errors["plain"], errors["triton"])), errors


def test_one_tensor_of_the_hidden_width_is_kept():
    """And backward leaves it as it was: a second backward pass gives the same."""
    inputs, grad = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = mlp(*inputs, "triton")
    assert [t.shape for t in kept if 7 in t.shape and 20 in t.shape] == [(1, 7, 20)]
    first, second = (torch.autograd.grad(y, inputs, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_not_a_number_is_not_hidden():
    """max(NaN, 0) is 0 on a GPU: a run that has diverged would look well. The other run keeps its bits."""
    inputs, grad = draw(2)
    before = mlp(*inputs, "triton").detach()
    with torch.no_grad():
        inputs[1][1, 0, 0] = float("nan")
    y = mlp(*inputs, "triton")
    grads = torch.autograd.grad(y, inputs, grad)
    assert torch.equal(y[0], before[0]) and y[1].isnan().all()
    assert all(g[0].isfinite().all() and g[1].isnan().any() for g in grads)


@pytest.mark.parametrize("op", ["relu2_mlp", "relu2_mlp_gradients"])
def test_operators_are_what_they_say_to_the_compiler(op):
    """PyTorch's own check: the schema, the shapes without data, and the operator under torch.compile's tracing."""
    inputs, grad = draw(2)
    inputs = [t.detach() for t in inputs]
    given = inputs if op == "relu2_mlp" else [grad, *inputs, gpu_mlp.relu2_mlp(*inputs)[1]]
    torch.library.opcheck(getattr(torch.ops.nanochat, op).default, tuple(given))


@pytest.mark.parametrize("runs", [None, 2])
def test_a_model_with_it_equals_one_without(runs):
    config = GPTConfig(sequence_len=8, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model, g = GPT(config, runs), torch.Generator().manual_seed(0)
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    model.to(DEVICE)
    idx, found = torch.arange(16, device=DEVICE).view(2, 8), []
    for kernel in ("plain", "triton"):
        for block in model.transformer.h:
            block.mlp.kernel = kernel
        loss = model(idx, idx.flip(-1))
        found.append((loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))))
    assert all(relative(b, a) < 10 * CLOSE for a, b in zip(*found))
