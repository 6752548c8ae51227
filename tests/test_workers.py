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
from jel.learn.workers import ParallelTask
from tests.conftest import ROOT


class Counting:
    """A task whose losses tell the group, the episode and all that it was asked to do."""

    num_steps = 4

    def __init__(self, start: float = 0.0):
        self.start = start

    def reset(self, group, episodes):
        self.losses = torch.tensor([self.start + group + episode / 7 for episode in episodes])

    def train(self, first_step, steps, factors):
        if first_step == 13:
            raise ValueError("step 13")
        self.losses = self.losses * factors["lr"] + first_step * steps + factors["weight_decay"]

    def probe_loss(self):
        return self.losses

    def grad_norm(self):
        return self.losses.square()


@pytest.fixture
def parallel():
    """Makes tasks of so many workers, and ends them."""
    tasks = []

    def make(workers):
        tasks.append(ParallelTask(partial(Counting, 0.1), workers, Counting.num_steps))
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


def factors(episodes):
    return {"lr": torch.linspace(0.3, 0.9, len(episodes)), "weight_decay": torch.linspace(1, 2, len(episodes))}


def answers(task, episodes):
    task.reset(5, episodes)
    found = [task.probe_loss()]
    for first in (0, 2):
        task.train(first, 2, factors(episodes))
        found += [task.probe_loss(), task.grad_norm()]
    return torch.stack(found)


def test_the_split_changes_nothing(parallel):
    task = parallel(3)
    for episodes in (range(6), range(2, 9), range(2), range(4, 5)):  # even, uneven, fewer than workers, one
        assert torch.equal(answers(task, episodes), answers(Counting(0.1), episodes))


def test_numbers_that_are_not_finite_come_back(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    task.train(0, 1, {"lr": torch.tensor([float("inf"), 1.0]), "weight_decay": torch.tensor([1.0, float("nan")])})
    losses = task.probe_loss()
    assert losses[0] == float("inf") and losses[1].isnan()


def test_an_error_is_raised_here_and_the_task_goes_on(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    with pytest.raises(ValueError, match="step 13") as raised:
        task.train(13, 1, factors(range(2)))
    assert "in train" in str(raised.value.__cause__)
    assert torch.equal(answers(task, range(4)), answers(Counting(0.1), range(4)))


def test_a_worker_pays_no_heed_to_signals(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for process, _ in task._workers:
            os.kill(process.pid, number)
    assert torch.equal(answers(task, range(4)), answers(Counting(0.1), range(4)))


def test_a_worker_that_is_gone_is_told_of(parallel):
    task = parallel(2)
    task.reset(0, range(2))
    os.kill(task._workers[1][0].pid, signal.SIGKILL)
    with pytest.raises(JelError, match="has ended.*last checkpoint"):
        task.train(0, 1, factors(range(2)))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["killed", "ended"])
def test_no_worker_outlives_its_owner(end):
    program = (
        "from tests.test_workers import Counting, ParallelTask\nimport time\n"
        "if __name__ == '__main__':\n"
        "    task = ParallelTask(Counting, 2, 4); task.reset(0, range(2))\n"
        "    print(*(process.pid for process, _ in task._workers), flush=True)\n"
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
