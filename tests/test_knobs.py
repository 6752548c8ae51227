"""Knobs, the multipliers they make, and how a multiplier reaches a param group."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jel import IDENTITY, JelError, Knob, apply_multipliers, validate_multipliers
from jel.knobs import check_knobs, even_decay, log_bounds, multipliers_from_values, multipliers_of_group
from tests.jel_parts import INF, NAN

# -----------------------------------------------------------------------------
# knobs


@pytest.mark.parametrize(
    "bad",
    [
        *({"bounds": b} for b in ((1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (NAN, 1.0), (0.1, NAN), (0.1, INF))),
        *({"bounds": b} for b in ((1.0, 2.0, 3.0), (1.0,), (), 5.0, None, ("0.1", "10"), (True, 2.0), (0.1, 10**400))),
        *({"scale": s} for s in ("linear", "", None, 1, [])),
        {"scale": "logit", "bounds": (0.5, 1.5)},
        *({"groups": g} for g in ((), ("a", "a"), ("",), (1,), "wte", None, ["a"])),
        *({"name": n} for n in ("", None, 3)),
        *({"hyperparameter": n} for n in ("", None, 3)),
    ],
)
def test_knobs_that_make_no_sense_are_refused(bad):
    with pytest.raises(JelError) as e:
        Knob(**{"name": "lr", "hyperparameter": "lr", **bad})
    assert "\n" not in str(e.value)


def test_a_knob_survives_json():
    for knob in (
        Knob("lr", "lr"),
        Knob("head", "lr", ("lm_head", "wte"), bounds=(0.5, 2.0)),
        Knob("momentum", "momentum", ("matrices",), "logit", (0.8, 0.99)),
    ):
        assert Knob.from_json(json.loads(json.dumps(knob.to_json()))) == knob
    with pytest.raises(dataclasses.FrozenInstanceError):
        knob.name = "other"


@pytest.mark.parametrize(
    "change",
    [
        *({"bounds": b} for b in (None, 3, [], [1], [1, 2, 3], ["a", "b"], [1, 10**400], [None, 1], {})),
        *({"groups": g} for g in (None, 3, [], "wte", [1], [[]], {})),
        {"surplus": 1},
    ],
)
def test_json_that_describes_no_knob(change):
    good = Knob("lr", "lr").to_json()
    for record in (
        {**good, **change},
        {k: v for k, v in good.items() if k not in change} if "surplus" not in change else [],
    ):
        with pytest.raises(JelError) as e:
            Knob.from_json(record)
        assert "\n" not in str(e.value)
    for record in (None, 3, [], "lr", {}):
        with pytest.raises(JelError, match="describes no knob"):
            Knob.from_json(record)


def test_a_controllers_knobs_have_names_of_their_own():
    check_knobs([Knob("a", "lr"), Knob("b", "lr")])
    for knobs in ([], [Knob("a", "lr"), Knob("a", "weight_decay")]):
        with pytest.raises(JelError, match="names that differ"):
            check_knobs(knobs)


def test_bounds_in_log_space():
    centre, half_width = log_bounds([Knob("a", "lr"), Knob("b", "lr", bounds=(1.0, 16.0))])
    torch.testing.assert_close(centre.exp(), torch.tensor([1.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(half_width.exp(), torch.tensor([100.0, 4.0], dtype=torch.float64))


# -----------------------------------------------------------------------------
# multipliers

NAMES = ("a", "b", "c")
KNOBS = st.lists(
    st.tuples(
        st.sampled_from(["lr", "weight_decay"]),
        st.lists(st.sampled_from(["*", *NAMES]), min_size=1, max_size=3, unique=True),
        st.floats(0.1, 10),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(KNOBS)
def test_knobs_that_reach_one_hyperparameter_multiply(drawn):
    """Against a loop over groups, hyperparameters and knobs: corrections of a group multiply what holds for all."""
    knobs = [Knob(str(i), key, tuple(groups)) for i, (key, groups, _) in enumerate(drawn)]
    values = [value for _, _, value in drawn]
    found = multipliers_from_values(knobs, values)
    validate_multipliers(found, NAMES)
    tensors = multipliers_from_values(knobs, [torch.tensor([v, 2 * v], dtype=torch.float64) for v in values])
    for group in (*NAMES, "another"):
        held, batched = multipliers_of_group(found, group), multipliers_of_group(tensors, group)
        for key in ("lr", "weight_decay"):
            want, number = 1.0, 0
            for knob, value in zip(knobs, values):
                if knob.hyperparameter == key and (group in knob.groups or "*" in knob.groups):
                    want, number = want * value, number + 1
            assert held.get(key, 1.0) == pytest.approx(want) and (key in held) == (number > 0)
            if number:
                assert batched[key].tolist() == pytest.approx([want, want * 2**number])


def test_a_value_is_needed_for_every_knob():
    with pytest.raises(ValueError):
        multipliers_from_values([Knob("a", "lr"), Knob("b", "lr")], [1.0])


# -----------------------------------------------------------------------------
# param groups


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0, 1e3)), min_size=1, max_size=4))
def test_identity_writes_the_base_bit_for_bit(values):
    groups = [{"name": str(i), "lr": -1.0, "weight_decay": -1.0, "betas": (0.8, 0.95)} for i in range(len(values))]
    held = [{"name": str(i), "lr": torch.tensor([-1.0, -1.0])} for i in range(len(values))]
    base = [{"lr": lr, "weight_decay": wd} for lr, wd in values]
    rates = [{"lr": torch.tensor([lr, wd])} for lr, wd in values]
    for identity in (IDENTITY, {}, {"0": {"lr": 1.0}}):
        apply_multipliers(groups, base, identity)
        assert [(g["lr"].hex(), g["weight_decay"].hex()) for g in groups] == [(a.hex(), b.hex()) for a, b in values]
    for identity in ({}, {"0": {"lr": 1.0}}, {"*": {"lr": torch.ones(2)}}):
        apply_multipliers(held, rates, identity)
        assert all(torch.equal(g["lr"], b["lr"]) for g, b in zip(held, rates))
    assert all(g["betas"] == (0.8, 0.95) for g in groups)


def test_own_name_wins_over_star_by_hyperparameter():
    groups, base = [{"name": "a"}, {"name": "b"}, {}], [{"lr": 1.0, "weight_decay": 1.0}] * 3
    apply_multipliers(groups, base, {"*": {"lr": 2.0, "weight_decay": 3.0}, "b": {"lr": 5.0}})
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(2, 3), (5, 3), (2, 3)]


def test_batched_multipliers_are_products():
    groups, m = [{"name": "a"}], torch.tensor([0.5, 2.0])
    base = [{"lr": 0.1, "weight_decay": torch.tensor([1.0, 3.0])}]
    apply_multipliers(groups, base, {"*": {"lr": m, "weight_decay": m}})
    torch.testing.assert_close(groups[0]["lr"], 0.1 * m)
    torch.testing.assert_close(groups[0]["weight_decay"], torch.tensor([0.5, 6.0]))


def test_a_tensor_that_a_group_holds_is_filled_in_place():
    """A captured graph or a compiled step keeps the tensor that it was made with."""
    scalar, each = torch.tensor(7.0), torch.tensor([7.0, 7.0])
    groups = [{"name": "a", "lr": scalar, "weight_decay": each, "momentum": 0.9}, {"name": "b", "lr": each.clone()}]
    other = groups[1]["lr"]
    base = [{"lr": 0.5, "weight_decay": 0.25, "momentum": 0.5}, {"lr": 2.0}]
    apply_multipliers(groups, base, {"*": {"lr": 4.0}, "a": {"weight_decay": torch.tensor([2.0, 4.0])}})
    assert groups[0]["lr"] is scalar and groups[0]["weight_decay"] is each and groups[1]["lr"] is other
    assert scalar.item() == 2.0 and each.tolist() == [0.5, 1.0] and other.tolist() == [8.0, 8.0]
    assert groups[0]["momentum"] == 0.5
    base[0]["lr"] = torch.tensor([1.0, 2.0])  # of another shape: the group gets a tensor of its own
    apply_multipliers(groups, base, {})
    assert groups[0]["lr"].tolist() == [1.0, 2.0] and base[0]["lr"] is not groups[0]["lr"] and scalar.item() == 2.0


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"lm_haed": {"lr": 1.0}}, "the groups are \\*, a, b"),
        ({"*": {"lr": NAN}}, "finite"),
        ({"a": {"lr": INF}}, "finite"),
        ({"a": {"lr": 0.0}}, "above 0"),
        ({"b": {"weight_decay": -1.0}}, "above 0"),
        ({"a": {"lr": "2"}}, "finite"),
        ({"a": {"lr": 10**400}}, "finite"),
        ({"*": {"lr": 2.0}, "b": {"beta": 2.0}}, "sets only lr, weight_decay"),
        ({"a": 2.0}, "must map"),
        (None, "must map"),
    ],
)
def test_bad_multipliers_are_refused_before_anything_is_written(bad, message):
    held = torch.tensor(7.0)
    groups = [{"name": "a", "lr": held, "weight_decay": 7.0}, {"name": "b", "lr": 7.0, "weight_decay": 7.0}]
    before = [dict(group) for group in groups]
    with pytest.raises(JelError, match=message):
        apply_multipliers(groups, [{"lr": 1.0, "weight_decay": 1.0}] * 2, bad)
    assert groups == before and groups[0]["lr"] is held and held.item() == 7.0


def test_a_base_that_does_not_fit_writes_nothing_either():
    groups = [{"name": "a", "lr": 7.0}, {"name": "b", "lr": 7.0}]
    short, shapes = [{"lr": 1.0}], [{"lr": 1.0}, {"lr": torch.ones(3)}]
    for base, multipliers in ((short, {}), (shapes, {"*": {"lr": torch.ones(2)}})):
        with pytest.raises((ValueError, RuntimeError)):
            apply_multipliers(groups, base, multipliers)
        assert [g["lr"] for g in groups] == [7.0, 7.0]


def test_importing_jel_brings_in_nothing_heavy_but_torch():
    code = (
        "import sys, jel, jel.learn.meta, jel.learn.workers, jel.recipes.jel; "
        "print([m for m in ('nanochat', 'matplotlib', 'wandb', 'pandas', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_multiplier_of_momentum_acts_on_its_distance_from_one():
    groups = [{"name": "a", "betas": (0.8, 0.95)}, {"name": "b", "momentum": 0.9}]
    base = [{"momentum": 0.8}, {"momentum": 0.9}]
    apply_multipliers(groups, base, {"*": {"1-momentum": 2.0}})
    assert groups[0]["betas"] == (pytest.approx(0.6), 0.95) and groups[1]["momentum"] == pytest.approx(0.8)
    apply_multipliers(groups, base, {"*": {"1-momentum": 100.0}})
    assert groups[0]["betas"][0] == groups[1]["momentum"] == 0.0  # never below
    apply_multipliers(groups, base, {"*": {"1-momentum": 1e-9}})
    assert groups[0]["betas"][0] == groups[1]["momentum"] == 0.9999  # nor so high that nothing new counts
    apply_multipliers(groups, base, {"*": {"1-momentum": torch.tensor([1.0, 2.0])}})
    assert groups[0]["betas"][0].tolist() == pytest.approx([0.8, 0.6])
    apply_multipliers(groups, base, {})
    assert groups[0]["betas"][0].tolist() == pytest.approx([0.8, 0.8])
    with pytest.raises(JelError, match="the base schedule sets only momentum"):
        apply_multipliers(groups, base, {"*": {"1-eps": 2.0}})


def test_even_decay_gives_every_group_the_same_rate_times_decay():
    learned = {"*": {"lr": 8.0, "1-momentum": 3.0}, "wte": {"lr": 40.0}, "lm_head": {"lr": 2.0, "weight_decay": 3.0}}
    even = even_decay({**learned, "scalars": {"1-momentum": 2.0}})
    products = {g: own["lr"] * own.get("weight_decay", 1.0) for g, own in even.items() if "lr" in own}
    assert products == pytest.approx({"*": 8.0, "wte": 8.0, "lm_head": 6.0})  # what was set stays as it was
    assert even["scalars"] == {"1-momentum": 2.0} and even["wte"]["lr"] == 40.0
    assert even_decay(even) == even and even_decay({"*": {"lr": 2.0}}) == {"*": {"lr": 2.0}}
    assert even_decay({"a": {"lr": 4.0}}) == {"a": {"lr": 4.0, "weight_decay": 0.25}}
    both = even_decay({"*": {"lr": 2.0, "weight_decay": 0.5}, "a": {"lr": 8.0}})
    assert both["a"]["weight_decay"] * 8.0 == 2.0 * 0.5


def test_two_names_of_one_hyperparameter_find_the_base():
    """The base knows an AdamW group's beta1 as its momentum; a multiplier may call it either."""
    base = {"lr": 0.1, "momentum": 0.8, "beta2": 0.95}
    for name in ("1-beta1", "1-momentum"):
        group = {"name": "a", "lr": 9.0, "betas": (0.5, 0.5)}
        apply_multipliers([group], [base], {"*": {name: 2.0, "1-beta2": 0.5, "lr": 3.0}})
        assert group["lr"] == pytest.approx(0.3) and group["betas"] == pytest.approx((0.6, 0.975))
    with pytest.raises(JelError, match="base schedule sets only"):
        apply_multipliers([{"name": "a", "lr": 9.0, "betas": (0.5, 0.5)}], [{"lr": 0.1}], {"*": {"1-beta1": 2.0}})
