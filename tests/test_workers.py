"""Episodes over worker processes: what one task would answer, errors as they are, and no worker outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from jel.errors import JelError
from jel.learn.workers import ParallelTask, WorkerPool
from tests.conftest import ROOT


class Counting:
    """A task whose losses tell the group, the episode and all that it was asked to do."""

    groups = ("wte", "lm_head")

    def __init__(self, start: float = 0.0):
        self.start = start

    def num_steps(self, group):
        return same_length(group)

    def reset(self, group, episodes):
        self.losses = torch.tensor([self.start + group + episode / 7 for episode in episodes])
        self.slots = {}

    def train(self, first_step, steps, multipliers):
        if first_step == 13:
            raise ValueError("step 13")
        everywhere, head = multipliers["*"], multipliers.get("lm_head", {})
        self.losses = self.losses * everywhere["lr"] + first_step * steps + everywhere["weight_decay"]
        self.losses = self.losses + head.get("lr", 0.0)

    def observe(self, names):
        known = {"probe_loss": self.losses, "grad_norm": self.losses.square()}
        return {name: known[name] for name in names}

    def save(self, slot, episodes):
        assert episodes.dtype == torch.bool and len(episodes) == len(self.losses)
        self.slots[slot] = torch.where(episodes, self.losses, self.slots.get(slot, self.losses))

    def load(self, slot, episodes):
        self.losses = torch.where(episodes, self.slots[slot], self.losses)


def same_length(group):
    return 4


@pytest.fixture
def parallel():
    """Makes tasks of so many workers, and ends them."""
    tasks = []

    def make(workers):
        tasks.append(ParallelTask(partial(Counting, 0.1), workers, Counting.groups, same_length))
        return tasks[-1]

    yield make
    for task in tasks:
        task.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"  # a dead one that nobody has waited for
    except FileNotFoundError:
        return False


def multipliers(episodes):
    everywhere = {"lr": torch.linspace(0.3, 0.9, len(episodes)), "weight_decay": torch.linspace(1, 2, len(episodes))}
    return {"*": everywhere, "lm_head": {"lr": torch.linspace(3, 4, len(episodes))}}


def answers(task, episodes):
    task.reset(5, episodes)
    some = torch.tensor([episode % 2 == 0 for episode in episodes])
    found = list(task.observe(["probe_loss"]).values())
    for first in (0, 2):
        task.train(first, 2, multipliers(episodes))
        task.save(first, some | (first == 0))
        observed = task.observe(["probe_loss", "grad_norm"])
        found += [observed["probe_loss"], observed["grad_norm"]]
    task.load(0, some)
    return torch.stack([*found, *task.observe(["probe_loss"]).values()])


def test_the_split_changes_nothing(parallel):
    task = parallel(3)
    for episodes in (range(6), range(2, 9), range(2), range(4, 5)):  # even, uneven, fewer than workers, one
        assert torch.equal(answers(task, episodes), answers(Counting(0.1), episodes))


def test_it_is_a_task_like_those_it_holds(parallel):
    task = parallel(2)
    assert task.groups == Counting.groups and task.num_steps(3) == 4
    task.reset(0, range(3))
    assert task.observe([]) == {}


def test_numbers_that_are_not_finite_come_back(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    own = {"lr": torch.tensor([float("inf"), 1.0]), "weight_decay": torch.tensor([1.0, float("nan")])}
    task.train(0, 1, {"*": own})
    losses = task.observe(["probe_loss"])["probe_loss"]
    assert losses[0] == float("inf") and losses[1].isnan()


def test_an_error_is_raised_here_and_the_task_goes_on(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    with pytest.raises(ValueError, match="step 13") as raised:
        task.train(13, 1, multipliers(range(2)))
    assert "in train" in str(raised.value.__cause__)
    assert torch.equal(answers(task, range(4)), answers(Counting(0.1), range(4)))


def test_workers_ignore_signals(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for process, _ in task._pool._workers:
            os.kill(process.pid, number)
    assert torch.equal(answers(task, range(4)), answers(Counting(0.1), range(4)))


def test_a_worker_that_is_gone_is_one_clear_line(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    os.kill(task._pool._workers[1][0].pid, signal.SIGKILL)
    with pytest.raises(JelError, match="has ended.*last checkpoint"):
        task.train(0, 1, multipliers(range(2)))


def test_a_pool_calls_any_method_of_those_it_is_asked_to():
    """At the same time in each, with arguments of its own; results in the order of the question."""
    pool = WorkerPool(partial(Counting, 0.1), 3)
    try:
        assert len(pool) == 3
        pool.call("reset", {i: (i, range(2)) for i in range(3)})
        found = pool.call("observe", {2: (["probe_loss"],), 0: (["probe_loss"],)})
        assert [round(one["probe_loss"][0].item(), 6) for one in found] == [2.1, 0.1]
        assert found[0]["probe_loss"].dtype == torch.float32
        with pytest.raises(AttributeError, match="no_such"):
            pool.call("no_such", {1: ()})
    finally:
        pool.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["killed", "ended"])
def test_no_worker_outlives_its_owner(end):
    program = (
        "from tests.test_workers import Counting, ParallelTask, same_length\nimport time\n"
        "if __name__ == '__main__':\n"
        "    task = ParallelTask(Counting, 2, (), same_length); task.reset(0, range(2))\n"
        "    print(*(process.pid for process, _ in task._pool._workers), flush=True)\n"
        f"    time.sleep({600 if end == 'killed' else 0})\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = list(map(int, owner.stdout.readline().split()))
    assert len(pids) == 2
    if end == "killed":
        assert all(map(alive, pids))
        owner.kill()
    assert owner.wait(timeout=20) == (-signal.SIGKILL if end == "killed" else 0)
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)
