"""The model against a slow twin, its facts (names, counts, initialisation), and batched runs against single ones.

R runs, B batch, T time, C width, D head dim, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from nanochat import loss_head as head
from nanochat.gpt import GPT, GPTConfig, window_sizes
from scripts.base_train import flags

T, V, R = 12, 70, 3
CONFIG = dict(sequence_len=T, vocab_size=V, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")


def make(seed=0, dtype=torch.float64, chunked=False, runs=None, **config) -> GPT:
    """A small model with no weight left at zero, so that every path carries a gradient."""
    g = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(**{**CONFIG, **config}), runs=runs).to(dtype)
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    model.loss_kernel = "chunked" if chunked else "plain"
    return model


def batch(*shape, seed=0, ignored=0.2):
    """Inputs and targets, a part of the targets -1."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -1
    return torch.randint(V, shape, generator=g), targets


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -----------------------------------------------------------------------------
# the forward pass


def slow_gpt(model, idx):
    """One sequence (T,) -> logits (T, V), head by head and position by position."""
    c, w, T = model.config, model.state_dict(), len(idx)
    D = c.n_embd // c.n_head

    def rms(u):
        return u / u.square().mean(-1, keepdim=True).sqrt()

    def rotate(u, t):  # by minus theta, halves split
        (a, b), cos, sin = (u[: D // 2], u[D // 2 :]), model.cos[t, 0], model.sin[t, 0]
        return rms(torch.cat([a * cos + b * sin, b * cos - a * sin]))

    x = x0 = rms(w["transformer.wte.weight"][idx])
    for i in range(c.n_layer):
        block = {k.split(".", 3)[3]: m for k, m in w.items() if k.startswith(f"transformer.h.{i}.")}
        window = c.sequence_len // 2 if (c.window_pattern * c.n_layer)[i] == "S" and i < c.n_layer - 1 else T
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h, y = rms(x), torch.zeros_like(x)
        for n in range(c.n_head):
            m = n // (c.n_head // c.n_kv_head)  # its kv head
            mine, kv = slice(n * D, (n + 1) * D), slice(m * D, (m + 1) * D)
            q, k, v = (h @ block[f"attn.c_{p}.weight"][rows].T for p, rows in (("q", mine), ("k", kv), ("v", kv)))
            if i % 2 == (c.n_layer - 1) % 2:
                gate = 2 * torch.sigmoid(h[:, :32] @ block["attn.ve_gate.weight"][m])
                v = v + gate[:, None] * w[f"value_embeds.{i}.weight"][idx][:, kv]
            for t in range(T):
                seen = range(max(0, t - window), t + 1)
                scores = torch.stack([rotate(q[t], t) @ rotate(k[s], s) for s in seen]) / D**0.5
                y[t, mine] = scores.softmax(0) @ v[seen.start : seen.stop]
        x = x + y @ block["attn.c_proj.weight"].T
        x = x + (rms(x) @ block["mlp.c_fc.weight"].T).relu().square() @ block["mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(x) @ w["lm_head.weight"][: c.vocab_size].T / 15)


@pytest.mark.parametrize(
    "change",
    [{}, {"n_kv_head": 4, "n_layer": 2}, {"n_kv_head": 1, "window_pattern": "SL"}],
    ids=["grouped, windows", "a kv head each", "one kv head"],
)
def test_forward_equals_its_slow_twin(change):
    model, (idx, _) = make(**change), batch(2, T)
    with torch.no_grad():
        close(model(idx), torch.stack([slow_gpt(model, row) for row in idx]))


def test_rotary_tables():
    """fp32, and right to its precision even at the far end of a long context."""
    model = make(dtype=torch.float32, sequence_len=2048, n_layer=1)
    for table, f in ((model.cos, math.cos), (model.sin, math.sin)):
        close(table[:, 0], torch.tensor([[f(t * 10000 ** (-2 * j / 16)) for j in range(8)] for t in range(2048)]), 5e-4)


def test_logits_are_fp32_capped_and_cropped():
    model, (idx, _) = make(dtype=torch.bfloat16), batch(2, T)
    assert model.lm_head.weight.shape == (128, 64)  # padded to a multiple of 64
    with torch.no_grad():
        model.lm_head.weight *= 1e3
        logits = model(idx)
    assert logits.dtype == torch.float32 and logits.shape == (2, T, V)
    assert 14.9 < logits.abs().max() <= 15


@pytest.mark.parametrize("chunked", [False, True])
def test_padding_rows_play_no_part(chunked):
    model, data = make(chunked=chunked), batch(2, T)
    before = model(*data)
    before.backward()
    tables = [model.lm_head, model.transformer.wte, *model.value_embeds.values()]
    assert not any(table.weight.grad[V:].any() for table in tables)
    with torch.no_grad():
        for table in tables:
            table.weight[V:] = 1e6
    assert model(*data).item() == before.item()


def test_losses():
    model, (idx, targets) = make(), batch(2, T)
    logits, losses, mean = model(idx), model(idx, targets, loss_reduction="none"), model(idx, targets)
    want = [
        -logits[b, t].log_softmax(-1)[targets[b, t]] if targets[b, t] >= 0 else 0 * logits.sum()
        for b in range(2)
        for t in range(T)
    ]
    assert losses.shape == (2 * T,) and mean.shape == ()
    close(losses, torch.stack(want))
    close(mean, sum(want) / (targets >= 0).sum())


def test_eight_micro_batches_are_one_batch():
    whole, parts, (idx, targets) = make(chunked=True), make(chunked=True), batch(8, T, ignored=0)
    whole(idx, targets).backward()
    for i in range(8):
        (parts(idx[i : i + 1], targets[i : i + 1]) / 8).backward()
    for p, q in zip(whole.parameters(), parts.parameters()):
        close(p.grad, q.grad, 1e-12)


# -----------------------------------------------------------------------------
# the chunked loss


@pytest.mark.parametrize("chunk", [1, 60, 1 << 19], ids=["a row at a time", "ragged", "one chunk"])
@pytest.mark.parametrize("runs", [1, 2])
def test_chunked_loss_equals_the_plain_one(runs, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    g = torch.Generator().manual_seed(runs)
    x, weight = (torch.randn(runs, n, 5, generator=g, dtype=torch.float64).mul_(3).requires_grad_() for n in (7, 9))
    targets = torch.randint(-1, 9, (runs, 7), generator=g)
    targets[:, 2], scale = (
        -1,
        torch.arange(1.0, runs + 1),
    )  # the runs have different weights in the sum that is differentiated
    plain = head.mean_loss(head.cross_entropy(head.softcapped_logits(x, weight), targets), targets)
    chunked = head.ChunkedLoss.apply(x, weight, targets)
    close(chunked, plain, 1e-12)
    grads = [torch.autograd.grad((loss * scale).sum(), (x, weight)) for loss in (plain, chunked)]
    for a, b in zip(*grads):
        close(a, b, 1e-12)
    assert torch.autograd.gradcheck(head.ChunkedLoss.apply, (x, weight, targets))


def test_a_model_with_the_chunked_loss_equals_one_without(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * V)
    plain, chunked, data = make(), make(chunked=True), batch(2, T)
    losses = [model(*data) for model in (plain, chunked)]
    assert losses[0].grad_fn.name() != losses[1].grad_fn.name()
    close(*losses)
    for loss in losses:
        loss.backward()
    for p, q in zip(plain.parameters(), chunked.parameters()):
        close(p.grad, q.grad, 1e-12)


# -----------------------------------------------------------------------------
# batched runs


def runs_and_singles(chunked=False):
    """R models and the batched one that holds the same weights, with an optimizer each and a rate per run."""
    singles, together = [make(seed=r, chunked=chunked) for r in range(R)], make(runs=R, chunked=chunked)
    with torch.no_grad():
        for name, p in together.named_parameters():
            p.copy_(torch.stack([single.get_parameter(name) for single in singles]))
    optimizers, optimizer = [m.setup_optimizer(weight_decay=0.2) for m in singles], together.setup_optimizer()
    for i, group in enumerate(optimizer.param_groups):
        rates = [group["lr"] * factor for factor in (0.1, 0.5, 1.0)]
        for single, rate in zip(optimizers, rates):
            single.param_groups[i].update(lr=rate, weight_decay=rate * 10)
        rates = torch.tensor(rates, dtype=torch.float64)
        group.update(lr=rates, weight_decay=rates * 10)
    return singles, optimizers, together, optimizer


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["data of their own", "shared data"])
def test_batched_runs_equal_single_runs(chunked, shared):
    singles, optimizers, together, optimizer = runs_and_singles(chunked)
    for step in range(3):
        idx, targets = batch(*(() if shared else (R,)), 2, T, seed=step)
        mine = [(idx, targets)] * R if shared else list(zip(idx, targets))
        close(together(idx), torch.stack([m(x) for m, (x, _) in zip(singles, mine)]))
        close(together(idx, targets, "none"), torch.stack([m(*xy, "none") for m, xy in zip(singles, mine)]))
        losses, loss = [m(*xy) for m, xy in zip(singles, mine)], together(idx, targets)
        assert loss.shape == (R,)
        close(loss, torch.stack(losses))
        loss.sum().backward()
        sum(losses).backward()
        for name, p in together.named_parameters():
            close(p.grad, torch.stack([m.get_parameter(name).grad for m in singles]))
        for o, m in zip([*optimizers, optimizer], [*singles, together]):
            o.step()
            m.zero_grad()
    for name, p in together.named_parameters():
        close(p.data, torch.stack([m.get_parameter(name).data for m in singles]))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_run_that_breaks_leaves_the_others_untouched(chunked):
    results = []
    for broken in (False, True):
        *_, together, optimizer = runs_and_singles(chunked)
        if broken:
            together.transformer.h[0].mlp.c_fc.weight.data[1, 0, 0] = math.nan
        for step in range(3):
            together.zero_grad()
            loss = together(*batch(R, 2, T, seed=step))
            loss.sum().backward()
            optimizer.step()
        results.append([loss.detach(), *(p.detach() for p in together.parameters())])
    assert results[1][0][1].isnan() and not results[0][0].isnan().any()
    for whole, rest in zip(*results):
        assert torch.equal(whole[[0, 2]], rest[[0, 2]])


# -----------------------------------------------------------------------------
# facts


def test_parameter_count_and_shape_from_depth():
    with torch.device("meta"):
        six, batched = (GPT(GPTConfig.from_depth(6, vocab_size=32768), runs) for runs in (None, 8))
    assert six.num_params() == batched.num_params() == 73_531_692
    assert six.device.type == "meta" and six.flops_per_token() == batched.flops_per_token()
    for depth, heads in {1: 1, 2: 1, 5: 3, 6: 3, 12: 6, 20: 10}.items():
        config = GPTConfig.from_depth(depth)
        assert (config.n_layer, config.n_embd, config.n_head, config.n_kv_head) == (depth, 128 * heads, heads, heads)


def test_flops_count_every_product_and_every_visible_key():
    model = make()
    products = sum(
        p.numel()
        for name, p in model.named_parameters()
        if "wte" not in name and "value_embeds" not in name and "lambdas" not in name
    )
    assert model.flops_per_token() == 6 * products + 12 * 64 * (T // 2 + T // 2 + T)


@pytest.mark.parametrize("n_layer", [1, 2, 3, 6])
def test_state_dict_keys(n_layer):
    gated = [i for i in range(n_layer) if (n_layer - 1 - i) % 2 == 0]
    assert gated[-1] == n_layer - 1
    want = {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas"}
    want |= {f"transformer.h.{i}.attn.{m}.weight" for i in range(n_layer) for m in ("c_q", "c_k", "c_v", "c_proj")}
    want |= {f"transformer.h.{i}.mlp.{m}.weight" for i in range(n_layer) for m in ("c_fc", "c_proj")}
    want |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in gated} | {f"value_embeds.{i}.weight" for i in gated}
    assert set(make(n_layer=n_layer).state_dict()) == set(make(n_layer=n_layer, runs=2).state_dict()) == want


def test_window_pattern_is_what_its_help_says():
    want = {"SSSL": [32, 32, 32, -1, 32, -1], "L": [-1] * 6, "S": [32] * 5 + [-1], "LSS": [-1, 32, 32, -1, 32, -1]}
    assert want == {p: window_sizes(GPTConfig(sequence_len=64, n_layer=6, window_pattern=p)) for p in want}
    said = " ".join(flags().format_help().split())
    assert "per layer, tiled: S sees half the context, L all of it; the last layer is always L" in said


def test_initialisation():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=512, n_layer=2, n_head=2, n_kv_head=1, n_embd=256))
    model.init_weights(torch.Generator().manual_seed(0))
    width = 256**-0.5
    for name, p in model.state_dict().items():
        if "c_proj" in name or "ve_gate" in name:
            assert not p.any(), name
        elif "lambdas" in name:
            assert (p == {"resid_lambdas": 1.0, "x0_lambdas": 0.1}[name]).all()
        else:
            std = {"transformer.wte.weight": 1.0, "lm_head.weight": 0.001}.get(name, width)
            assert p.std() == pytest.approx(std, rel=0.02) and abs(p.mean()) < 0.02 * std, name
            uniform = p.abs().max() <= math.sqrt(3) * std * 1.0001  # a normal's largest lies beyond 3 std
            assert uniform == (std == width), name


def test_runs_start_alike_and_like_a_single_model_even_from_meta():
    with torch.device("meta"):
        single, together = GPT(GPTConfig(**CONFIG)), GPT(GPTConfig(**CONFIG), runs=2)
    for model in (single, together):
        model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(7))
    for name, p in single.named_parameters():
        assert torch.equal(torch.stack([p, p]), together.get_parameter(name)), name


@pytest.mark.parametrize("change", [{"window_pattern": "SX"}, {"window_pattern": ""}, {"n_embd": 16}])
def test_what_cannot_be(change):
    with pytest.raises(ValueError, match="window pattern|width"):
        make(**change)
    with pytest.raises(ValueError, match="13 tokens do not fit"):
        make()(batch(1, T + 1)[0])


@pytest.mark.parametrize("runs", [None, 2])
def test_embeddings_stay_fp32_and_what_is_read_is_cast_under_autocast(runs):
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), runs=runs)
    model.init_weights()
    idx = torch.zeros((1, 4) if runs is None else (runs, 1, 4), dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = model.transformer.wte(idx)
        loss = model(idx, idx)
    assert read.dtype == torch.bfloat16 and model.transformer.wte(idx).dtype == torch.float32
    loss.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
