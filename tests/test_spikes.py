"""What counts as a spike, and how much more carefully a run goes on: the divergence guard by itself."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jel import IDENTITY
from nanochat.common import UserError
from nanochat.divergence_guard import REACH, WARMUP, WINDOW, DivergenceGuard

CURVES = st.tuples(st.integers(0, 2**32), st.floats(2, 12), st.floats(0.1, 10), st.floats(1, 300), st.floats(0, 0.1))


def curve(seed: int, end: float, drop: float, time: float, noise: float, n: int = 150) -> list[float]:
    """A loss that falls exponentially, fast or slowly, under Gaussian noise in proportion to its end."""
    rng = random.Random(seed)
    return [end + drop * math.exp(-t / time) + noise * end * rng.gauss(0, 1) for t in range(n)]


def seen(losses: list[float], max_tries: int = 8) -> DivergenceGuard:
    guard = DivergenceGuard(max_tries)
    for step, loss in enumerate(losses):
        assert not guard.is_spike(loss), f"{loss} at {step} after {guard.recent}"
        guard.accept(step, loss)
    return guard


# -----------------------------------------------------------------------------
# the guard


@settings(max_examples=60, deadline=None)
@given(CURVES, st.integers(WINDOW, 149))
def test_ordinary_losses_are_no_spikes_and_leaps_are(parameters, at):
    losses = curve(*parameters)
    guard = seen(losses[:at])
    top, low = max(guard.recent), min(guard.recent)
    assert guard.is_spike(top + 13 * (top - low) + 0.1 * top) and not guard.is_spike(top)
    assert all(guard.is_spike(x) for x in (math.nan, math.inf, -math.inf))


@settings(max_examples=60, deadline=None)
@given(CURVES, st.integers(-20, 20), st.floats(0.5, 4), st.integers(0, 149))
def test_the_verdict_does_not_depend_on_the_scale(parameters, power, factor, at):
    losses, scale = curve(*parameters), 2.0**power
    plain, scaled = DivergenceGuard(8), DivergenceGuard(8)
    for step, loss in enumerate(losses):
        loss *= factor if step == at else 1
        assert plain.is_spike(loss) == scaled.is_spike(loss * scale)
        plain.accept(step, loss)
        scaled.accept(step, loss * scale)


def test_before_the_spread_is_known_only_a_surge_counts():
    guard = seen([6.0, 15.0, 9.0, 7.0])  # a first step may double the loss
    assert guard.is_spike(30.1) and not guard.is_spike(29.9)
    even = seen([3.0] * WARMUP)
    assert even.is_spike(3.2) and not even.is_spike(3.1)  # no spread at all: the floor


def test_no_finite_loss_is_a_spike_when_it_is_off():
    guard = seen([3.0] * WINDOW + [300.0], max_tries=0)
    assert guard.is_spike(math.nan)
    with pytest.raises(UserError, match=r"the run diverged at step 7 \(loss nan\) and --max-recoveries is 0"):
        guard.count("the run diverged at step 7 (loss nan)", "stop")


def test_it_gives_up_after_the_stated_tries():
    guard = DivergenceGuard(2)
    guard.count("a spike at step 3", "stop"), guard.count("a spike at step 4", "stop")
    with pytest.raises(UserError, match="a spike at step 5 after 2 recoveries; lower the rates"):
        guard.count("a spike at step 5", "lower the rates")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.dictionaries(
                st.sampled_from(["*", "wte"]),
                st.fixed_dictionaries({}, optional={"lr": st.floats(1e-6, 1e6), "weight_decay": st.floats(1e-6, 1e6)}),
            ),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_caps_only_shrink_and_only_rates(cuts):
    guard = DivergenceGuard(8)
    for step, multipliers in cuts:
        before, reach = guard.lr_cap, guard.reach(step)
        now = guard.limit(multipliers)
        assert (now is multipliers) == (before == math.inf) and 0 <= reach <= max(0, step - REACH)
        guard.cut(step, math.nan, now, IDENTITY)
        limited = guard.limit(multipliers)
        assert guard.lr_cap < before
        assert (
            all(limited[group]["lr"] <= guard.lr_cap for group in limited if "lr" in limited[group])
            and "lr" in limited["*"]
        )
        assert all(
            limited[g]["weight_decay"] == f["weight_decay"] for g, f in multipliers.items() if "weight_decay" in f
        )
        again = DivergenceGuard(8)
        again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        assert again.state_dict() == guard.state_dict() and again.limit(multipliers) == limited


def test_spikes_in_a_row_are_answered_more_and_more_carefully():
    guard, fast, slow = DivergenceGuard(8), {"*": {"lr": 1000.0}}, {"*": {"lr": 2.0}}
    answers = []
    for step in (100, 104, 104, 104 + 2 * WINDOW):
        reach = step - guard.reach(step)
        guard.cut(step, math.inf, guard.limit(fast), slow)
        answers.append((reach, guard.lr_cap))
    assert answers == [(5, 500.0), (10, 2.0), (20, 0.125), (5, 0.0625)]
    assert guard.skipped == [103]  # 104 came back as it was
