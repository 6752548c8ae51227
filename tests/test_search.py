"""Search beside learning: the same episodes, knobs and price; it finds a better constant; a resume asks the same."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from jel import JelError
from jel.learn.given_actions import set_constant
from jel.learn.halving import HalvingSearch, rung_size, rungs
from jel.learn.rollout import Interrupted
from jel.learn.search import SEARCHES
from jel.learn.shared_results import SharedResults
from jel.policy import GaussianPolicy, multiplier_table
from jel.recipes.jel import JelRecipe
from tests.jel_parts import QuadraticTask, same

PACKAGES = {"cma": "cmaes", "halving": "optuna"}
needs = {name: pytest.mark.skipif(not importlib.util.find_spec(name), reason=name) for name in PACKAGES.values()}
METHODS = [pytest.param(m, marks=[needs[PACKAGES[m]]] if m in PACKAGES else []) for m in sorted(SEARCHES)]
E, K, ENDS = 8, 5, [5, 10, 15, 20, 23]


def make(method, seed=3, updates=15, task=None, **where):
    recipe = JelRecipe(episodes=E, decision_interval=5, updates=updates)
    return recipe.searcher(method, task or QuadraticTask(floor=0.1), seed, 8, **where)


def run(trainer, updates):
    return [trainer.update() for _ in range(updates)]


# -----------------------------------------------------------------------------
# any search


@pytest.mark.parametrize("method", METHODS)
def test_it_finds_a_rate_that_is_better_than_the_base(method):
    """0.02 is far too careful for this quadratic, and too much of it diverges: the best is in between."""
    trainer = make(method)
    records = run(trainer, 15)
    found = multiplier_table(trainer.policy, [0.0, 0.9])
    assert found[0]["multipliers"] == found[1]["multipliers"]  # a constant
    assert 3 < found[0]["multipliers"]["*"]["lr"] < 100
    assert records[-1]["multipliers"]["*"]["lr"][0] == found[0]["multipliers"]["*"]["lr"]


@pytest.mark.parametrize("method", METHODS)
def test_a_resume_changes_nothing(method):
    whole = make(method)
    run(whole, 11)
    for stop in (2, 3, 10):  # halving: within a bracket, after one, in the play-offs
        first, second = make(method, updates=15), make(method, updates=15)
        run(first, stop)
        second.load_state_dict(first.state_dict())
        assert second.updates == stop
        run(second, 11 - stop)
        assert same(whole.policy, second.policy) and whole.trained() == second.trained()
    with pytest.raises(JelError, match="asked other questions"):
        make(method, seed=4).load_state_dict(first.state_dict())
    with pytest.raises(JelError, match="other sizes"):
        make(method).load_state_dict({**first.state_dict(), "raw": torch.zeros(3, 2)})


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_group_is_asked_again(method):
    calm, calls = make(method), iter([False] * 7 + [True])
    disturbed = make(method, stop_requested=lambda: next(calls, False))
    run(calm, 3)
    interrupted = 0
    while disturbed.updates < 3:
        try:
            disturbed.update()
        except Interrupted:
            interrupted += 1
    assert interrupted == 1 and same(calm.policy, disturbed.policy)


@pytest.mark.parametrize("method", METHODS)
def test_its_price_is_what_was_trained(method):
    """Never more than as many groups of whole episodes, and less by less than a candidate an update."""
    task = CountingTask()
    trainer = make(method, task=task)
    run(trainer, 7)
    assert trainer.trained() == (task.steps_trained, task.readings)
    budget = 7 * E * ENDS[-1]
    assert budget - 7 * ENDS[1] <= task.steps_trained <= budget


class CountingTask(QuadraticTask):
    steps_trained = readings = 0

    def train(self, first_step, steps, multipliers):
        super().train(first_step, steps, multipliers)
        self.steps_trained += steps * len(self.x)

    def observe(self, names):
        self.readings += len(self.x)
        return super().observe(names)


@pytest.mark.parametrize("method, package", PACKAGES.items())
def test_without_its_package_it_says_what_to_install(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(JelError, match=rf"needs the package {package}: pip install 'just-enough-learning\[search\]'"):
        make(method)


def test_a_constant_policy_is_constant_and_deploys_what_it_was_given():
    policy, raw = GaussianPolicy(seed=5), torch.tensor([0.7, -0.3])
    set_constant(policy, raw)
    mean, log_std = policy(torch.rand(9, 1))
    assert torch.equal(mean, raw.expand(9, 2)) and (log_std == 0).all()


# -----------------------------------------------------------------------------
# successive halving


def test_every_rung_costs_one_group():
    for ends in ([561], [5, 10], ENDS, [*range(50, 551, 50), 561], [15, 30, 45, 60, 75]):
        ladder = rungs(len(ends))
        assert ladder[-1] == len(ends) and len(ladder) == min(3, len(ends))
        for rung in ladder:
            steps = ends[rung - 1]
            assert E * ends[-1] - steps < steps * rung_size(E, steps, ends[-1]) <= E * ends[-1]


@needs["optuna"]
def test_the_best_go_up_and_the_winner_defends_its_place():
    """Candidates are judged by one true number; brackets of three rungs, 8 groups: two brackets, two play-offs."""
    search, true = HalvingSearch(2, E, 8, seed=1), lambda raw: -(torch.tanh(raw) - 0.3).square().sum(1)
    asked = []
    for _ in range(8):
        raw, decisions = search.ask(ENDS)
        asked.append((raw, decisions))
        search.tell(raw, true(raw))
        if decisions == K:
            assert torch.equal(search.best(), raw[true(raw).argmax()])
    assert [decisions for _, decisions in asked] == [1, 2, 5, 1, 2, 5, 5, 5]
    assert [len(raw) for raw, _ in asked] == [36, 18, 8, 36, 18, 8, 8, 8]
    values = [true(raw).sort(descending=True).values for raw, _ in asked]
    assert torch.equal(values[1], values[0][:18]) and torch.equal(values[2], values[1][:8])
    champion = asked[2][0][true(asked[2][0]).argmax()]
    assert torch.equal(asked[5][0][0], champion)
    assert torch.equal(values[5], torch.cat([values[2][:1], values[4][:7]]).sort(descending=True).values)
    assert torch.equal(asked[6][0], asked[7][0])
    assert torch.equal(values[6], torch.cat([values[2], values[5]]).unique().flip(0)[:8])


@needs["optuna"]
def test_play_offs_are_won_by_the_sum_of_them():
    search = HalvingSearch(1, E, 5, seed=2)
    for _ in range(3):
        raw, _ = search.ask(ENDS)
        search.tell(raw, raw[:, 0])
    first, second = torch.arange(8.0), torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0.5])
    search.tell(search.ask(ENDS)[0], first)
    field, _ = search.ask(ENDS)
    search.tell(field, second)
    assert torch.equal(search.best(), field[(first + second).argmax()])


@needs["optuna"]
def test_with_fewer_groups_than_rungs_the_lowest_are_left_out():
    search = HalvingSearch(1, E, 2, seed=2)
    for rung in rungs(K)[-2:]:
        raw, decisions = search.ask(ENDS)
        assert decisions == rung
        search.tell(raw, torch.zeros(len(raw)))


@needs["optuna"]
def test_what_blows_up_loses_and_all_may():
    search = HalvingSearch(1, E, 3, seed=0)
    for _ in range(3):
        raw, _ = search.ask(ENDS)
        search.tell(raw, torch.full((len(raw),), -float("inf")))
    assert search.best().isfinite().all()
    search = HalvingSearch(1, E, 3, seed=0)
    raw, _ = search.ask(ENDS)
    search.tell(raw, torch.where(raw[:, 0] > 0, -float("inf"), -5.0))
    survivors, _ = search.ask(ENDS)
    assert (survivors <= 0).sum() == min(len(survivors), int((raw <= 0).sum()))


# -----------------------------------------------------------------------------
# several processes


def shared_search(path, seed, method="halving"):
    return make(method, seed, shared=SharedResults(path, JelRecipe().knobs(), seed))


@needs["optuna"]
def test_processes_learn_of_each_other(tmp_path):
    """What the first has found is deployed by one that has trained little, once it has held its own there."""
    path = tmp_path / "search.journal"
    first, second = shared_search(path, 1), shared_search(path, 2)
    run(first, 3)
    alone = run(make("halving", 2), 3)
    together = run(second, 3)
    assert (second._told[-1][0] == first.searcher.best()).all(1).any()  # it stood in the last rung
    assert together[-1]["return_best"] >= alone[-1]["return_best"]
    assert len(first.shared.news()) == sum(len(raw) for raw, *_ in second._told)
    random = shared_search(path, 3, "random")
    random.update()
    assert len(random._heard) == len(first.shared._study.trials) - E  # all but its own


@needs["optuna"]
def test_a_shared_search_resumes_exactly_though_others_go_on(tmp_path):
    path = tmp_path / "search.journal"
    ours, theirs = shared_search(path, 1), shared_search(path, 2)
    run(theirs, 3)
    run(ours, 4)
    saved, before = ours.state_dict(), len(ours.shared._study.trials)
    run(ours, 1)  # lost by a kill, but told to the others
    resumed = shared_search(path, 1)
    resumed.load_state_dict(saved)
    run(resumed, 2)
    run(ours, 1)
    assert same(ours.policy, resumed.policy) and ours.trained() == resumed.trained()
    keys = [tuple(t.user_attrs["key"]) for t in ours.shared._study.trials]
    assert len(keys) > before and len(keys) == len(set(keys))


@needs["optuna"]
def test_a_file_that_is_no_shared_search_is_one_line(tmp_path):
    path = tmp_path / "search.journal"
    SharedResults(path, JelRecipe().knobs(), 1)
    with pytest.raises(JelError, match="other knobs"):
        SharedResults(path, JelRecipe(action_range=10).knobs(), 1)
    path.write_text("something else\nand more\n")
    with pytest.raises(JelError, match="cannot be used as the file of a shared search") as e:
        SharedResults(path, JelRecipe().knobs(), 1)
    assert "\n" not in str(e.value)
    with pytest.raises(JelError, match="single processes"):
        shared = SharedResults(tmp_path / "b.journal", JelRecipe().knobs(), 1)
        make("halving", world_size=2, shared=shared)
