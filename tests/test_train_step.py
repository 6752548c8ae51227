"""The training step: micro-batches, runs side by side, and updates that are not taken."""

from __future__ import annotations

import pytest
import torch

from nanochat.common import Compute
from nanochat.gpt import GPT, GPTConfig
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.train_step import train_step

CPU = Compute(0, 1, torch.device("cpu"))
T, V = 8, 70


def make(runs: int | None = None, kind: str = "muon-adamw"):
    """A model in float64 whose weights are all different from 0, and its optimizer."""
    model = GPT(GPTConfig(sequence_len=T, vocab_size=V, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), runs).double()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            one = torch.randn(p.shape if runs is None else p.shape[1:], generator=generator, dtype=p.dtype)
            p.add_(one, alpha=0.1)
    optimizer = model.setup_optimizer(weight_decay=0.2)
    if kind == "schedule-free":
        optimizer = ScheduleFreeMuon(optimizer.param_groups, 0.05, 0.01, 2)
    return model, optimizer


def batches(*seeds: int, rows: int = 2):
    drawn = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        drawn.append((torch.randint(V, (rows, T), generator=g), torch.randint(V, (rows, T), generator=g)))
    return drawn


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["muon-adamw", "schedule-free"])
def test_micro_batches_are_one_batch(kind):
    (whole, a), (parts, b) = make(kind=kind), make(kind=kind)
    for step in range(3):
        micro = batches(2 * step, 2 * step + 1)
        joined = tuple(torch.cat(t) for t in zip(*micro))
        assert train_step(whole, a, [joined], CPU).item() == pytest.approx(train_step(parts, b, micro, CPU).item())
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-9)


def test_runs_side_by_side_are_each_alone():
    (together, a), (alone, b) = make(runs=3), make()
    for group in a.param_groups:
        group["lr"] = group["lr"] * torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    for step in range(3):
        micro = batches(2 * step, 2 * step + 1)
        losses = train_step(together, a, micro, CPU)
        loss = train_step(alone, b, micro, CPU)
        assert losses.shape == (3,) and loss.shape == () and not losses.requires_grad
        torch.testing.assert_close(losses[1], loss)
    for name, p in together.named_parameters():
        torch.testing.assert_close(p[1], alone.get_parameter(name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["muon-adamw", "schedule-free"])
def test_an_update_that_is_not_accepted_leaves_no_trace(kind):
    (plain, a), (careful, b) = make(kind=kind), make(kind=kind)
    asked = []

    def refuse(loss):
        asked.append((loss.item(), careful.lm_head.weight.grad.norm().item()))
        return False

    before = weights(careful)
    refused = train_step(careful, b, batches(7), CPU, accept=refuse)
    torch.testing.assert_close(weights(careful), before, rtol=0, atol=0)
    assert asked == [(refused.item(), careful.lm_head.weight.grad.norm().item())] and asked[0][1] > 0
    for step in range(2):
        train_step(plain, a, batches(step), CPU)
        train_step(careful, b, batches(step), CPU, accept=lambda loss: True)
    torch.testing.assert_close(weights(careful), weights(plain), rtol=0, atol=0)


def test_gradients_stay_until_the_next_step_and_are_not_added_to():
    model, optimizer = make()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    norms = []
    for _ in range(2):
        train_step(model, optimizer, batches(3), CPU)
        norms.append(model.lm_head.weight.grad.norm().item())
    assert norms[0] == norms[1] > 0
