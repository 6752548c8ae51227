"""The meta-training loop: an update is all or nothing, a resume changes nothing, and the policy learns."""

from __future__ import annotations

import pytest
import torch

from jel.learn.rollout import Interrupted, RewardConfig
from jel.policy import GaussianPolicy
from jel.recipes.jel import ADVANTAGES, JelRecipe
from tests.jel_parts import FEEDBACK, QuadraticTask, same

RECIPE = dict(policy_lr=3e-3, minibatch_size=16, episodes=6, decision_interval=5)


def make_trainer(seed=0, stop=lambda: False, chunk=6, floor=0.0, **choices):
    recipe = JelRecipe(**{**RECIPE, **choices})
    return recipe.trainer(QuadraticTask(floor=floor), seed, seed, seed, chunk, stop_requested=stop)


def test_an_update_is_all_or_nothing():
    """Interrupted in the middle of a group and run again, the result is bit for bit that of the undisturbed loop."""
    calm, calls = make_trainer(), iter([False] * 7 + [True])
    disturbed = make_trainer(stop=lambda: next(calls, False))
    calm.update(), calm.update()
    disturbed.update()
    with pytest.raises(Interrupted):
        disturbed.update()
    assert disturbed.updates == 1
    disturbed.update()
    assert same(calm.policy, disturbed.policy)


@pytest.mark.parametrize("features", [("progress",), FEEDBACK])
def test_resume_is_exact(features):
    whole, first = make_trainer(features=features), make_trainer(features=features)
    for _ in range(5):
        whole.update()
    for _ in range(2):
        first.update()
    second = make_trainer(seed=9, features=features)  # another policy, so that everything must come from the state
    second.seed = 0
    second.load_state_dict(first.state_dict())
    records = [second.update() for _ in range(3)]
    assert same(whole.policy, second.policy)
    assert [r["step"] for r in records] == [2, 3, 4]


@pytest.mark.parametrize("features", [("progress",), FEEDBACK])
def test_chunks_change_no_update(features):
    trainers = [make_trainer(chunk=chunk, features=features) for chunk in (6, 1, 4)]
    records = [[trainer.update() for _ in range(2)] for trainer in trainers]
    assert all(same(trainers[0].policy, trainer.policy) for trainer in trainers[1:])
    assert all([r["returns"] for r in found] == [r["returns"] for r in records[0]] for found in records[1:])


def test_the_policy_learns_to_raise_the_rate():
    """0.02 is far too careful for this quadratic: the learning-rate multiplier must rise, the return with it."""
    trainer = make_trainer(episodes=16, chunk=16)
    records = [trainer.update() for _ in range(40)]
    assert records[-1]["multipliers"]["*"]["lr"][0] > 3
    first, last = (sum(r["return_mean"] / r["probe_first"] for r in part) for part in (records[:5], records[-5:]))
    assert last > first


def test_a_record_says_what_the_update_did():
    record = make_trainer(floor=5.0).update()  # so high that no rise is a blow-up
    assert record["step"] == 0 and record["episodes_alive"] == 6 and len(record["returns"]) == 6
    assert record["decision_progress"] == [0, 5 / 23, 10 / 23, 15 / 23, 20 / 23]
    assert {key: len(values) for key, values in record["multipliers"]["*"].items()} == {"lr": 5, "weight_decay": 5}
    assert record["return_mean"] == pytest.approx(sum(record["returns"]) / 6)
    assert record["return_best"] == max(record["returns"])
    assert make_trainer(features=FEEDBACK).update()["multipliers"] == {}  # they depend on the run


def test_a_blow_up_is_counted_and_does_not_poison():
    for features in (("progress",), FEEDBACK):
        trainer = make_trainer(features=features)
        task = trainer.env.task
        observe = task.observe

        def broken(names, observe=observe, task=task):
            lost = torch.arange(len(task.x)) == 2
            return {name: torch.where(lost, float("nan"), value) for name, value in observe(names).items()}

        task.observe = broken
        record = trainer.update()
        assert record["episodes_alive"] == 5
        assert all(p.isfinite().all() for p in trainer.policy.parameters())


def test_a_recipe_makes_the_parts_it_names():
    recipe = JelRecipe(action_range=10.0, decay_range=5.0, hidden=8, features=FEEDBACK, advantages="standard")
    policy = recipe.policy(seed=5)
    assert same(policy, GaussianPolicy(recipe.knobs(), FEEDBACK, 8, 5))
    assert [(knob.name, knob.bounds) for knob in policy.knobs] == [("lr", (0.1, 10)), ("weight_decay", (0.2, 5))]
    assert recipe.updater(policy, 0).advantages is ADVANTAGES["standard"]
    env = JelRecipe(reward=RewardConfig(gradient_penalty=0.1)).env(QuadraticTask(), GaussianPolicy())
    env.reset(0, range(2))
    assert set(env.readings) == {"probe_loss", "grad_norm"}
