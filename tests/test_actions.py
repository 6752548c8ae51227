"""Raw actions become values of the knobs: the paper's squashing, by name."""

from __future__ import annotations

import math

import pytest
import torch

from jel import JelError, Knob
from jel.actions import LogScale, log_scale
from tests.jel_parts import generator, knobs


@pytest.mark.parametrize("r", [100.0, 1.5])
def test_values_are_exp_of_log_range_tanh(r):
    raw = torch.tensor([[0.0, 20.0], [-20.0, 0.5]])
    want = [[1.0, r], [1 / r, math.exp(math.log(r) * math.tanh(0.5))]]
    torch.testing.assert_close(LogScale(knobs(r)).values(raw), torch.tensor(want))
    torch.testing.assert_close(log_scale(raw, 0.0, math.log(r)), torch.tensor(want))


def test_an_action_of_0_is_a_multiplier_of_exactly_1():
    assert LogScale(knobs()).multipliers(torch.zeros(2)) == {"*": {"lr": 1.0, "weight_decay": 1.0}}


def test_each_knob_has_its_own_bounds():
    actions = LogScale([Knob("a", "lr", bounds=(1.0, 16.0)), Knob("b", "weight_decay", bounds=(0.5, 8.0))])
    torch.testing.assert_close(actions.values(torch.tensor([0.0, 0.0])), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(actions.values(torch.tensor([30.0, -30.0])), torch.tensor([16.0, 0.5]))


def test_multipliers_are_floats_for_one_run_and_tensors_for_many():
    actions = LogScale([*knobs(), Knob("head", "lr", ("lm_head",), bounds=(0.5, 2.0))])
    raw = torch.randn(4, 3, generator=generator())
    values, many = actions.values(raw), actions.multipliers(raw)
    assert torch.equal(many["*"]["lr"], values[:, 0]) and torch.equal(many["*"]["weight_decay"], values[:, 1])
    torch.testing.assert_close(many["lm_head"]["lr"], values[:, 0] * values[:, 2])
    for i in range(4):
        one = actions.multipliers(raw[i])
        for group, own in one.items():
            for key, value in own.items():
                assert type(value) is float and value == pytest.approx(many[group][key][i].item(), rel=1e-6)


def test_other_scales_are_refused():
    with pytest.raises(JelError, match="knobs momentum are not on a log scale"):
        LogScale([Knob("lr", "lr"), Knob("momentum", "momentum", scale="logit", bounds=(0.8, 0.99))])
    with pytest.raises(JelError, match="names that differ"):
        LogScale([])
