"""What fits into a time: the plan never takes longer, gives up in a stated order, and says what it left out."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from scripts.plan import FEWEST_UPDATES, Costs, Plan, describe, largest, plans, seconds_of, wished

WISH = Plan(3, 8, 8, 0, 12, 20, steps=561, episode_steps=578.0)
COSTS = Costs(step=0.3, episode_step=0.02, start=20.0, eval_steps=6.7, side_by_side=1)


def total(plan: Plan, costs: Costs = COSTS) -> float:
    return sum(seconds_of(plan, costs).values())


def test_seconds_are_those_of_a_plan_written_out():
    plan = replace(WISH, seeds=2, settings=3, fair=0, constants=1, updates=10, validations=4)
    setting, method = 20 + 0.3 * (561 + 6.7), 20 + 0.3 * (561 + 4 * 6.7)
    assert abs(total(plan) - (4 * setting + 10 * method + 2 * (20 + 10 * 578 * 0.02))) < 1e-6
    pairs = replace(COSTS, side_by_side=2)  # 3 settings take two rounds, 1 constant one, 10 runs five
    assert abs(total(plan, pairs) - (3 * setting + 5 * method + 2 * (20 + 10 * 578 * 0.02))) < 1e-6


@given(st.floats(60, 20_000), st.floats(0.001, 1.0), st.floats(0.001, 0.2), st.floats(0, 60), st.integers(1, 8))
def test_a_plan_fits_and_the_one_before_it_does_not(seconds, step, episode_step, start, side_by_side):
    costs = Costs(step, episode_step, start, 6.7, side_by_side)
    every, plan = [*plans(WISH)], largest(WISH, costs, seconds)
    if plan is None:
        assert total(every[-1], costs) > seconds
        return
    assert total(plan, costs) <= seconds
    assert all(total(other, costs) > seconds for other in every[: every.index(plan)])
    assert largest(WISH, costs, 2 * seconds) in every[: every.index(plan) + 1]  # more time, no smaller plan


def test_things_are_given_up_in_the_stated_order():
    every = [*plans(WISH)]
    assert every[0] == WISH and every[1] == replace(WISH, fair=0)
    first = {
        name: next(i for i, p in enumerate(every) if getattr(p, name) < getattr(WISH, name))
        for name in vars(WISH)
        if any(getattr(p, name) < getattr(WISH, name) for p in every)
    }
    assert list(sorted(first, key=first.get)) == ["fair", "settings", "constants", "seeds", "updates", "steps"]
    least = every[-1]
    assert (least.seeds, least.settings, least.constants, least.updates) == (1, 1, 2, FEWEST_UPDATES)
    assert all(total(a) >= total(b) for a, b in zip(every, every[1:]))


def test_the_words_name_what_was_left_out():
    plan = largest(WISH, COSTS, 1500)
    said = "\n".join(describe(plan, WISH, COSTS, 1500))
    assert f"{plan.seeds} of 3 seeds" in said and "0 of 8 further ones" in said and "step 300.0 ms" in said
    short = replace([*plans(WISH)][-1], steps=70)
    assert "runs are cut to 70 of 561 steps: numbers are not the preset's" in "\n".join(
        describe(short, WISH, COSTS, 60)
    )
    assert "left out" not in "\n".join(describe(WISH, WISH, COSTS, 1e6))


def test_the_wish_is_what_the_presets_say():
    paper, smoke = wished("paper", 3), wished("smoke", 1)
    assert (paper.steps, paper.tuned, paper.settings, paper.fair, paper.updates) == (561, 0, 8, 8, 9)
    assert (smoke.steps, smoke.settings, smoke.tuned, smoke.updates) == (12, 2, 2, 3)
    assert paper.validations == 6  # at 0, 141, 282, 423 and the end, and the test split
