"""Which kernels are taken: by rule, by measurement, by name; and that nothing is taken that is wrong or absent."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch

from nanochat import attention as attention_module
from nanochat import kernel_choice, loss_head, mlp_kernel
from nanochat.attention import FULL, Shape, attention, backend_for
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, replayed
from nanochat.kernel_choice import fastest
from nanochat.loss_head import loss_kernel_for
from nanochat.loss_packages import PACKAGES
from nanochat.mlp_kernel import mlp_kernel_for

LONG, SHORT = (Shape(2, T, 4, 4, 8, (T // 2, FULL)) for T in (2048, 256))
HEAD = (None, 64, 32, 128, 100)


def answer(seconds: float, value: float = 1.0):
    def run():
        return (torch.full((3,), value),)

    run.seconds = seconds
    return run


def test_the_fastest_right_one_is_taken_and_all_is_said(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(kernel_choice, "_seconds", lambda run, rounds: run.seconds)
    candidates = {"broken": broken, "slow": answer(0.02), "wrong": answer(0, 1.5), "fast": answer(0.001, 1.001)}
    assert fastest("loss", candidates, "slow", tolerance=0.01) == "fast"
    said = capsys.readouterr().out
    assert said.startswith("loss: fast, by measurement: broken refused (RuntimeError: no such kernel)")
    assert "slow 20.00 ms" in said and "wrong refused (ArithmeticError: its result differs from slow's by 0.5)" in said
    close, clear = {"a": answer(1.02), "b": answer(1.0)}, {"a": answer(1.1), "b": answer(1.0)}
    assert fastest("loss", close, "b", 0.01) == "a" and fastest("loss", clear, "b", 0.01) == "b"
    assert fastest("loss", {"slow": answer(1), "nan": answer(0, float("nan"))}, "slow", 0.01) == "slow"


def test_seconds_are_of_one_call():
    assert 0.01 <= kernel_choice._seconds(lambda: time.sleep(0.01), 3)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with an H100, as far as the choice looks at it; measurements are recorded, and choose the last."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention_module, "flash_attention_3", None)
    monkeypatch.setattr(attention_module, "_load_flash_attention_3", lambda: None)
    monkeypatch.setattr(attention_module, "measured_backend", lambda names, *_: asked.append(names) or names[-1])
    monkeypatch.setattr(loss_head, "measured_loss", lambda *shape: asked.append(shape) or "triton")
    return asked


def test_attention_by_rule_and_by_measurement(hopper, monkeypatch):
    monkeypatch.setattr(attention_module, "varlen_has_windows", lambda grouped: False)
    assert backend_for("cuda", True, SHORT) == "sdpa" and not hopper
    assert backend_for("cuda", True, LONG) == "sdpa" and hopper == [("flex", "sdpa")]
    assert backend_for("cuda", False, LONG) == "sdpa" and len(hopper) == 1  # there is nothing to choose from
    monkeypatch.setattr(attention_module, "varlen_has_windows", lambda grouped: not grouped)
    backend_for("cuda", True, LONG)
    backend_for("cuda", True, Shape(2, 2048, 4, 2, 8, (FULL,)))
    assert hopper[1:] == [("varlen", "sdpa"), ("flex", "sdpa")]
    monkeypatch.setattr(attention_module, "_load_flash_attention_3", lambda: print)
    backend_for("cuda", True, LONG)
    assert hopper[-1] == ("fa3", "varlen", "sdpa")
    assert backend_for("cuda", True, LONG, "flex") == backend_for("cuda", True, SHORT, "flex") == "flex"


def test_loss_by_rule_and_by_measurement(hopper, monkeypatch):
    assert loss_kernel_for("cpu", False, HEAD) == "chunked" and loss_kernel_for("cpu", True, HEAD) == "plain"
    monkeypatch.setattr(loss_head.importlib.util, "find_spec", lambda name: None)
    assert loss_kernel_for("cuda", True, HEAD) == "plain" and not hopper
    there = {"triton"}
    monkeypatch.setattr(loss_head.importlib.util, "find_spec", lambda name: name if name in there else None)
    assert loss_kernel_for("cuda", True, (4, 1 << 20, 32, 128, 100)) == "triton"
    shape = 4, loss_head.MEASURED_TOKENS // 4, 32, 128, 100  # not at more than fits
    assert hopper == [(shape, True, ("triton", "plain"))]
    assert loss_kernel_for("cuda", True, HEAD, "triton-fp8") == "triton-fp8"
    with pytest.raises(UserError, match="'cce' is not available here"):
        loss_kernel_for("cuda", True, HEAD, "cce")
    there.update(PACKAGES.values())
    for kernel in PACKAGES:
        assert loss_kernel_for("cuda", True, HEAD, kernel) == kernel
        with pytest.raises(UserError, match="not available here"):  # of a batched model
            loss_kernel_for("cuda", True, (4, *HEAD[1:]), kernel)
    loss_kernel_for("cuda", True, HEAD)
    assert hopper[-1] == (HEAD, True, ("triton", "plain", "liger", "cce"))


def test_what_a_package_cannot_do_is_said(monkeypatch, capsys):
    """Measured on a CPU in place of a GPU: runs side by side are refused by their reason, and another one is taken."""

    def measured(names):
        g = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(2, n, 8, generator=g) for n in (5, 64))
        targets = torch.randint(60, (2, 5), generator=g)
        runs = {n: lambda n=n: (loss_head.head_loss(x, weight, targets, 60, n),) for n in names}
        return fastest("loss", runs, "plain", loss_head.TOLERANCE, 1)

    assert measured(("plain", "liger", "cce")) == "plain"
    said = capsys.readouterr().out
    assert "liger refused (UserError: liger takes one model" in said and "cce refused (UserError: cce takes" in said


def test_mlp_by_rule_and_by_measurement(hopper, monkeypatch):
    shape, there = (None, 1 << 20, 32, 128), set()
    monkeypatch.setattr(mlp_kernel, "measured_mlp", lambda *shape: hopper.append(shape) or "triton")
    monkeypatch.setattr(mlp_kernel.importlib.util, "find_spec", lambda name: name if name in there else None)
    assert mlp_kernel_for("cuda", True, shape) == "plain" and not hopper
    there.add("triton")
    assert mlp_kernel_for("cpu", True, shape) == mlp_kernel_for("cuda", True, shape, "plain") == "plain" and not hopper
    assert mlp_kernel_for("cuda", True, shape) == mlp_kernel_for("cuda", True, shape, "triton") == "triton"
    assert hopper == [((None, mlp_kernel.MEASURED_TOKENS, 32, 128), True)]
    with pytest.raises(UserError, match="'triton' is not available here; there is plain"):
        mlp_kernel_for("cpu", True, shape, "triton")


@pytest.mark.parametrize("what", [{"attention": "fa3"}, {"loss": "triton"}, {"loss": "liger"}, {"mlp": "triton"}])
def test_a_kernel_that_is_not_there_is_one_clear_line(what):
    model = GPT(GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    with pytest.raises(UserError, match="is not available here; there is"):
        model.prepare(**what)
    with pytest.raises(UserError, match="float8|not available"):  # of a batched model, or without a GPU for it
        GPT(model.config, runs=2).prepare(loss="triton-fp8")


def test_flash_attention_3_is_found_where_it_is(monkeypatch):
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = print
    package.__spec__ = object()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert attention_module._load_flash_attention_3.__wrapped__() is print


def slow_varlen(q, k, v, starts_q, starts_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn` as documented: sequence by sequence, `window_size` keys to each side."""
    assert starts_q.dtype == torch.int32 and enable_gqa == (q.size(1) != k.size(1))
    y, (left, right) = torch.zeros_like(q), window_size
    for first, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist()):
        assert end - first <= max_q == max_k
        for h in range(q.size(1)):
            kv = h // (q.size(1) // k.size(1))
            scores = q[first:end, h] @ k[first:end, kv].T / q.size(-1) ** 0.5
            distance = torch.arange(end - first)[:, None] - torch.arange(end - first)[None, :]
            hidden = (-distance > right if right >= 0 else distance > end) | (distance > left if left >= 0 else False)
            y[first:end, h] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[first:end, kv]
    return y


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [FULL, 0, 3, 100])
def test_varlen_attention_is_called_as_documented(monkeypatch, window, kv_heads):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 9, heads, 8, generator=g) for heads in (4, kv_heads, kv_heads))
    torch.testing.assert_close(attention(q, k, v, window, "varlen"), attention(q, k, v, window), rtol=0, atol=1e-5)
    new = q[:, -2:]  # decoding stays with SDPA
    assert torch.equal(attention(new, k, v, window, "varlen"), attention(new, k, v, window))


def slow_flash_3(q, k, v, causal, window_size):
    """FlashAttention-3's `flash_attn_func` as documented: `causal` hides the future, the window what is far back."""
    starts = torch.arange(0, (len(q) + 1) * q.size(1), q.size(1), dtype=torch.int32)
    left, right = window_size[0], 0 if causal else window_size[1]
    rows, gqa = [t.flatten(0, 1) for t in (q, k, v)], q.size(2) != k.size(2)
    return slow_varlen(*rows, starts, starts, q.size(1), q.size(1), window_size=(left, right), enable_gqa=gqa).view_as(
        q
    )


@pytest.mark.parametrize("window", [FULL, 0, 3, 100])
def test_flash_attention_3_is_called_as_documented(monkeypatch, window):
    monkeypatch.setattr(attention_module, "flash_attention_3", slow_flash_3)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 4, 8, generator=g) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, window, "fa3"), attention(q, k, v, window), rtol=0, atol=1e-5)


def test_a_replay_does_not_overwrite_the_losses_before_it():
    """Under CUDA graphs a call returns the same memory as the call before it."""
    memory = torch.zeros(())

    def graph(x):
        return memory.fill_(x)

    forward = replayed(graph)
    losses = [forward(1.0), forward(2.0)]
    assert [loss.item() for loss in losses] == [1.0, 2.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_measured_choices_on_this_gpu(capsys):
    """Every candidate agrees with the reference, and one is chosen."""
    shape = Shape(2, 1024, 3, 3, 128, (512, FULL))
    assert attention_module.measured_backend(tuple(attention_module.candidates(True)), shape, True, 3)
    assert loss_head.measured_loss((None, 4096, 384, 32768, 32768), True, ("triton", "plain"), 3)
    assert mlp_kernel.measured_mlp((None, 4096, 384, 1536), True, 3)
    assert "refused" not in capsys.readouterr().out
