"""Attention against an explicit softmax, one query at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat import attention as attention_module
from nanochat.attention import FULL, attention, backend_for, prepare_block_masks

B, H, D = 2, 4, 6


def slow_attention(q, k, v, window):
    """Every query of every head on its own: q (B, T, H, D), k and v (B, S, K, D)."""
    T, S = q.size(1), k.size(1)
    y = torch.zeros_like(q)
    for b in range(q.size(0)):
        for h in range(q.size(2)):
            kv = h // (q.size(2) // k.size(2))  # heads in a row share a kv head
            for i in range(T):
                now = S - T + i
                seen = range(0 if window == FULL else max(0, now - window), now + 1)
                scores = torch.tensor([q[b, i, h].dot(k[b, j, kv]) / math.sqrt(q.size(3)) for j in seen])
                weights = scores.exp() / scores.exp().sum()
                y[b, i, h] = sum(w * v[b, j, kv] for w, j in zip(weights, seen))
    return y


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tensors(T, S, kv_heads):
    torch.manual_seed(T + 10 * S + 100 * kv_heads)
    return torch.randn(B, T, H, D), torch.randn(B, S, kv_heads, D), torch.randn(B, S, kv_heads, D)


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("window", [FULL, 0, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("T, S", [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_equals_an_explicit_softmax(T, S, window, kv_heads):
    q, k, v = tensors(T, S, kv_heads)
    torch.testing.assert_close(attention(q, k, v, window), slow_attention(q, k, v, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [FULL, 3])
def test_decoding_equals_one_pass(window):
    """The last rows of a full pass are what a few new queries see of all the keys."""
    q, k, v = tensors(9, 9, 2)
    whole = attention(q, k, v, window)
    for new in (1, 2, 5):
        torch.testing.assert_close(attention(q[:, -new:], k, v, window), whole[:, -new:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [0, 2, 5])
def test_keys_outside_the_window_and_in_the_future_get_no_gradient(window):
    q, k, v = (t.requires_grad_() for t in tensors(9, 9, 2))
    query = 6
    attention(q, k, v, window)[:, query].sum().backward()
    touched = v.grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    assert touched == list(range(max(0, query - window), query + 1))


@pytest.mark.parametrize("window", [5, 64])
def test_compiled_flex_attention_is_ours(monkeypatch, window):
    """As it is called on a GPU, except that a CPU has no backward for it; the masks are there before compilation."""
    monkeypatch.setattr(attention_module, "_block_masks", {})
    q, k, v = (t.float() for t in tensors(140, 140, 2))
    compiled = torch.compile(lambda *qkv: attention(*qkv, window, "flex"), backend="eager", fullgraph=True)
    prepare_block_masks(140, [window, FULL, 139], q.device)
    assert list(attention_module._block_masks) == [(140, window, q.device)]
    monkeypatch.setattr(attention_module, "_mask", None)  # flex it is
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), slow_attention(q, k, v, window), rtol=0, atol=1e-5)


def test_cpu_uses_sdpa():
    assert backend_for("cpu", compiled=True) == backend_for("cpu", compiled=False) == "sdpa"
