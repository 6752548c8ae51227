"""Sampling with the key-value cache against its slow twin: a full forward pass for every token."""

from __future__ import annotations

import pytest
import torch

from nanochat.engine import KVCache, generate
from nanochat.gpt import GPT, GPTConfig

T, V = 24, 70
PROMPT = [3, 1, 4, 1, 5]


def make(window_pattern: str = "SL") -> GPT:
    """Three layers, two query heads a kv head; windows of half the context, so that decoding leaves them."""
    g = torch.Generator().manual_seed(0)
    model = GPT(
        GPTConfig(
            sequence_len=T, vocab_size=V, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern=window_pattern
        )
    ).double()
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    return model


@torch.no_grad()
def slow_generate(model, tokens, max_tokens, temperature=1.0, top_k=50, seed=0):
    """Every token from a full forward pass, without a cache."""
    generator, tokens = torch.Generator().manual_seed(seed), list(tokens)
    for _ in range(max_tokens):
        logits = model(torch.tensor([tokens]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        order = logits.argsort(descending=True)
        probabilities = (logits / temperature).exp()
        if top_k is not None:
            probabilities[order[top_k:]] = 0
        tokens.append(int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator)))
    return tokens[-max_tokens:]


@pytest.mark.parametrize("window_pattern", ["SL", "L"])
def test_greedy_equals_a_full_pass_per_token(window_pattern):
    model = make(window_pattern)
    assert generate(model, PROMPT, 19, temperature=0) == slow_generate(model, PROMPT, 19, temperature=0)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 50), (0.7, 5), (2.0, None)])
def test_sampling_equals_a_full_pass_per_token(temperature, top_k):
    model = make()
    found = generate(model, PROMPT, 19, temperature, top_k, seed=11)
    assert found == slow_generate(model, PROMPT, 19, temperature, top_k, seed=11)


@torch.no_grad()
def test_cached_logits_equal_a_full_pass_however_the_tokens_arrive():
    model, tokens = make(), torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    for pieces in ([T], [1] * T, [5, 1, 1, 13, 4], [20, 4]):
        cache, parts = KVCache(3), []
        for piece in tokens.split(pieces, dim=1):
            parts.append(model(piece, kv_cache=cache))
        assert cache.length == T
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_window_matters_when_decoding():
    """The same weights with and without windows agree while all fits into one, and not after that."""
    models = make("SL"), make("L")
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(1))
    with_window, without = (
        [model(t, kv_cache=cache) for t in tokens.split(1, dim=1)] for model, cache in ((m, KVCache(3)) for m in models)
    )
    same = [torch.allclose(a, b, atol=1e-10) for a, b in zip(with_window, without)]
    assert same == [True] * (T // 2 + 1) + [False] * (T // 2 - 1)  # itself and the T / 2 before it


def test_the_cache_refuses_to_outgrow_the_model():
    model, cache = make(), KVCache(3)
    model(torch.zeros(1, T, dtype=torch.long), kv_cache=cache)
    with pytest.raises(ValueError, match="25 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)


def test_top_k_of_one_is_greedy():
    model = make()
    assert generate(model, PROMPT, 19, temperature=3.0, top_k=1, seed=5) == generate(model, PROMPT, 19, temperature=0)


def test_the_seed_alone_decides():
    model = make()
    before = torch.get_rng_state()
    texts = [generate(model, PROMPT, 19, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)  # sampling leaves the run's random numbers alone


def test_stops_at_the_stop_token_and_leaves_it_out():
    model = make()
    free = generate(model, PROMPT, 19, temperature=2.0)
    stop = free[8]
    assert generate(model, PROMPT, 19, temperature=2.0, stop=stop) == free[: free.index(stop)]


@pytest.mark.parametrize("asked, prompt, got", [(0, 5, 0), (7, 5, 7), (1000, 5, T - 5), (3, T - 1, 1), (3, T, 0)])
def test_length(asked, prompt, got):
    assert len(generate(make(), [1] * prompt, asked)) == got


@pytest.mark.parametrize("tokens, temperature", [([], 1.0), ([1], -0.1)])
def test_what_cannot_be(tokens, temperature):
    with pytest.raises(ValueError, match="at least one token"):
        generate(make(), tokens, 3, temperature=temperature)
