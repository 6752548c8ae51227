"""Liger's and Apple's losses behind ours: called as their documentation says, by twins that do what it says.

Neither package runs without a GPU: where one is installed, the call is checked against its real signature.
"""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt, loss_packages
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.loss_head import head_loss


def slow_linear_cross_entropy(e, c, targets, ignore_index, softcap, reduction):
    """Either package's documentation: cross-entropy of `softcap tanh(e c^T / softcap)`, without ignored targets."""
    logits = (e @ c.T).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def slow_liger(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
):
    """`liger_fused_linear_cross_entropy` from version 0.6; 0.8 has `chunk_mem_const` too, older ones no `accum_dtype`.

    Without `accum_dtype` chunks of the weight's gradient are summed in its own dtype.
    """
    assert bias is None and ce_weight is None and not return_z_loss
    assert accum_dtype == torch.float32
    return slow_linear_cross_entropy(input, weight, target, ignore_index, softcap, reduction)


def old_liger(input, weight, target, ignore_index=-100, reduction="mean", softcap=None):
    return slow_linear_cross_entropy(input, weight, target, ignore_index, softcap, reduction)


def slow_cce(
    e,
    c,
    targets,
    bias=None,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=0,
    filter_eps="auto",
    accum_e_fp32=False,
    accum_c_fp32=False,
):
    """`cut_cross_entropy.linear_cross_entropy`: bf16 only, and gradients below the filter are left out unless None."""
    assert e.dtype == c.dtype == torch.bfloat16 and filter_eps is None and accum_e_fp32 and accum_c_fp32 and shift == 0
    return slow_linear_cross_entropy(e, c, targets, ignore_index, softcap, reduction)


def old_cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
    """Version 25.1.1, which the package index has."""
    assert filter_eps is None
    return slow_linear_cross_entropy(e, c, targets, ignore_index, softcap, reduction)


TWINS = {"liger": (slow_liger, old_liger), "cce": (slow_cce, old_cce)}
CALLS = [(kernel, twin) for kernel, twins in TWINS.items() for twin in twins]


def draw(N=9, C=16, P=64, V=50):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(N, C, generator=g).mul(3).bfloat16(), torch.randn(P, C, generator=g)
    targets = torch.randint(V, (N,), generator=g)
    targets[2] = -1
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("kernel, twin", CALLS)
def test_a_package_is_called_as_documented(kernel, twin, monkeypatch):
    """Softcap, targets of -1, the vocabulary without its padding: loss and gradients of the plain form."""
    monkeypatch.setattr(loss_packages, "_function", lambda name: twin)
    x, weight, targets = draw()
    results = []
    for name in ("plain", kernel):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = head_loss(x, weight, targets, 50, name)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for a, b in zip(*results):
        assert b.dtype == a.dtype and b.shape == a.shape
        assert (a.float() - b.float()).norm() < 5e-3 * a.float().norm()
    assert not results[1][2][50:].any() and not results[1][1][2].any()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        each, plain = (head_loss(x, weight, targets, 50, name, "none") for name in (kernel, "plain"))
    torch.testing.assert_close(each, plain, rtol=5e-3, atol=5e-3)
    assert each[2] == 0


def test_losses_per_token_are_differentiated_by_the_plain_form(monkeypatch):
    """Liger before 0.8 scales the weight's gradient after the sum over tokens, which cannot be right."""
    monkeypatch.setattr(loss_packages, "_function", lambda name: pytest.fail("called"))
    x, weight, targets = draw()
    loss = head_loss(x.float(), weight, targets, 50, "liger", "none")
    assert torch.equal(loss, head_loss(x.float(), weight, targets, 50, "plain", "none")) and loss.requires_grad


@pytest.mark.parametrize("kernel", TWINS)
def test_runs_side_by_side_are_refused(kernel):
    x, weight, targets = (t[None] for t in draw())
    with pytest.raises(UserError, match=f"{kernel} takes one model, not runs"):
        head_loss(x, weight, targets, 50, kernel)


@pytest.mark.parametrize("kernel", TWINS)
def test_the_model_stays_one_graph_and_the_head_outside(kernel, monkeypatch):
    """Loss and gradients of the eager model, the body traced whole; the package sees no tracing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen = []

    def twin(x, weight, targets, **options):
        seen.append(torch.compiler.is_compiling())
        return slow_linear_cross_entropy(x, weight, targets, -1, options["softcap"], options["reduction"])

    monkeypatch.setattr(loss_packages, "_function", lambda name: twin)
    monkeypatch.setattr(gpt, "loss_kernel_for", lambda *_: kernel)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = GPT(GPTConfig(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(torch.Generator().manual_seed(0))
    idx = torch.arange(16).view(2, 8)
    forward = model.prepare(compiled=True)
    found = [forward(idx, idx.flip(-1))]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and seen == [False]
    model.loss_kernel = "plain"
    found.append(model(idx, idx.flip(-1)))
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in found]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    model.loss_kernel = kernel
    assert bits_per_byte(forward, [(idx, idx)], torch.ones(50)) > 0
    with pytest.raises(UserError, match=f"the loss kernel {kernel} is outside"):
        model.prepare(compiled=True, cuda_graphs=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", TWINS)
def test_the_real_signature_takes_what_is_given(kernel):
    """What is passed is bound to the function of the package, and every option of precision that it has is used."""
    pytest.importorskip(loss_packages.PACKAGES[kernel], reason="it comes with pip install -e .[gpu]")
    real, given = loss_packages._function(kernel), []

    def recorder(*args, **options):
        inspect.signature(real).bind(*args, **options)
        given.append(options)
        return torch.zeros(())

    recorder.__signature__ = inspect.signature(real)
    x, weight, targets = draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_packages, "_function", lambda name: recorder)
        head_loss(x, weight, targets, 50, kernel)
    known = inspect.signature(real).parameters
    (options,) = given
    assert options["softcap"] == 15.0 and options["ignore_index"] == -1 and options["reduction"] == "mean"
    assert all((name in options) == (name in known) for name in ("accum_dtype", "accum_c_fp32", "chunk_mem_const"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kernel", TWINS)
def test_the_real_package_on_this_gpu(kernel):
    pytest.importorskip(loss_packages.PACKAGES[kernel], reason="it comes with pip install -e .[gpu]")
    x, weight, targets = (t.detach().cuda() for t in draw(256, 128, 1024, 1000))
    x.requires_grad_(), weight.mul_(0.1).requires_grad_()
    results = []
    for name in ("plain", kernel):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = head_loss(x, weight, targets, 1000, name)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all((a.float() - b.float()).norm() < 0.02 * a.float().norm() for a, b in zip(*results))
