"""The meta-training loop of LHOPT: groups of episodes on tasks of the bank -> PPO.

A group is E episodes of one task, side by side. What a group does depends on (seed, update, number of the group) and
the policy alone, so groups may run in any number of processes and ranks: the result is the same, bit for bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import Tensor

from jel.learn.control import Trajectories, random_starts, run
from jel.learn.ppo import PPO
from jel.learn.speedup import fit_power_law, last_points, log_speedup
from jel.policy_lstm import LstmPolicy
from jel.tasks.small.bank import BankTask
from jel.tasks.small.episodes import DEFAULTS
from jel.validation_guard import RETREATS

REWARDS = ("score", "speedup", "both")


@dataclass(frozen=True)
class Episode:
    """How the groups of an update are drawn."""

    decisions: int = 20
    groups: int = 4  # a group is one task
    episodes: int = 32  # side by side: twice as many as 16 cost a third more
    noise: tuple[tuple[float, float], ...] = ((1e-2, 1e2), (0.1, 10.0), (0.1, 10.0), (0.1, 10.0))
    default_starts: float = 0.25  # the share of episodes that start from the default hyperparameters
    hidden_val: float = 0.2  # the share of groups whose policy is not shown the validation loss
    keep: int = 1  # where it is shown, a run ends with the mean of so many of its best weights: safety is not learned
    retreats: int = RETREATS  # and goes back to the best of them so often
    reward: str = "score"
    baseline_episodes: int = 4  # of the averaged actor, for a reward by its curve


@dataclass(frozen=True)
class Job:
    """One group."""

    seed: int
    update: int
    group: int

    def draw(self, tasks: Sequence[BankTask], e: Episode) -> tuple[int, list[int], Tensor, bool, torch.Generator]:
        """Index of the task, seeds, starts (E, 4), whether validation losses are hidden, and a generator."""
        rng = random.Random(f"{self.seed}/{self.update}/{self.group}")
        # kinds are drawn alike, however many of their tasks the bank kept
        kind = rng.choice(sorted({t.spec["kind"] for t in tasks}))
        index = rng.choice([i for i, t in enumerate(tasks) if t.spec["kind"] == kind])
        n = e.episodes + (e.baseline_episodes if e.reward != "score" else 0)
        seeds = [rng.randrange(10_000, 2**31)] * n  # one, so that returns differ by starts and choices alone
        generator = torch.Generator().manual_seed(rng.randrange(2**62))
        starts = random_starts(n, generator, e.noise)
        default = torch.rand(n, generator=generator) < e.default_starts
        starts = torch.where(default[:, None], torch.tensor(DEFAULTS), starts)
        return index, seeds, starts, rng.random() < e.hidden_val, generator


@dataclass(frozen=True)
class Group:
    """What a group of episodes leaves behind."""

    trajectories: Trajectories
    returns: Tensor  # (E,)
    task: int  # index
    core_seconds: float


def run_group(
    job: Job, policy: LstmPolicy, averaged: LstmPolicy | None, tasks: Sequence[BankTask], e: Episode
) -> Group:
    """Run a group's episodes, in this process."""
    begun = time.process_time()
    index, seeds, starts, hide, generator = job.draw(tasks, e)
    common = {"generator": generator, "hide_val": hide, "task_index": index, "n_tasks": len(tasks)}
    common |= {"keep": 0 if hide else e.keep, "retreats": e.retreats}
    if e.reward == "score":
        t = run(policy, tasks[index], seeds, starts, e.decisions, **common)  # type: ignore[arg-type]
        return Group(t, t.score, index, time.process_time() - begun)
    calm = torch.arange(len(seeds)) >= e.episodes
    t = run(
        policy,
        tasks[index],
        seeds,
        starts,
        e.decisions,
        deterministic=calm,
        averaged=averaged,
        **common,  # type: ignore
    )
    total = float(tasks[index].task.steps)
    curve = t.val[:, calm].nan_to_num(float("inf")).median(dim=1).values
    speed = log_speedup(t.val[-1], total, *fit_power_law(*last_points(curve, total)))
    returns = speed if e.reward == "speedup" else (speed + t.score) / 2
    return Group(t.of(~calm), returns[~calm], index, time.process_time() - begun)


class ControlTrainer:
    """Owns the loop: `update()` runs the groups of one update and learns from them, all or nothing.

    `workers` processes share the groups of this rank. Over several ranks each runs its share, all are given the results
    of all, and every rank makes the same update for itself.
    """

    def __init__(
        self,
        ppo: PPO,
        tasks: Sequence[BankTask],
        episode: Episode,
        seed: int,
        updates: int,
        workers: int = 1,
        lr_factor: Callable[[float], float] = lambda progress: 1.0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.ppo, self.tasks, self.episode, self.seed, self.updates = ppo, list(tasks), episode, seed, updates
        self.lr_factor, self.rank, self.world_size = lr_factor, rank, world_size
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, get_context("spawn"), _begin_worker, (self.tasks, episode, torch.get_num_threads())
            )

    def update(self) -> dict:
        """One update; returns the record for the log."""
        start, n = time.perf_counter(), self.ppo.updates
        jobs = [Job(self.seed, n, g) for g in range(self.episode.groups)]
        groups = self._from_all_ranks(list(self._results(jobs[self.rank :: self.world_size])))
        collected, begun = time.perf_counter(), time.process_time()
        joined = Trajectories.join([g.trajectories for g in groups])
        returns = torch.cat([g.returns for g in groups])
        group_of = [number for number, g in enumerate(groups) for _ in g.returns]
        stats = self.ppo.update(joined, returns, group_of, self.lr_factor(n / self.updates))
        learning = (time.process_time() - begun) * self.world_size  # every rank makes the same update
        kinds = {self.tasks[g.task].spec["kind"]: round(g.trajectories.score.mean().item(), 3) for g in groups}
        return {
            "update": n,
            "return": returns.mean().item(),
            "score": joined.score.mean().item(),
            "kinds": kinds,
            **stats,
            "episodes": joined.features.shape[1],
            "seconds": time.perf_counter() - start,
            "rollout_seconds": collected - start,
            "core_seconds": sum(g.core_seconds for g in groups) + learning,
        }

    def _results(self, jobs: Sequence[Job]) -> Iterator[Group]:
        averaged = None if self.episode.reward == "score" else self.ppo.averaged
        if self._pool is None:
            return (run_group(job, self.ppo.policy, averaged, self.tasks, self.episode) for job in jobs)
        return self._pool.map(_run_in_worker, [(job, self.ppo.policy, averaged) for job in jobs])

    def _from_all_ranks(self, mine: list[Group]) -> list[Group]:
        """Every rank's results in the order of the jobs, which were dealt out in turn."""
        if self.world_size == 1:
            return mine
        parts: list[list] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, mine)
        return [parts[g % self.world_size][g // self.world_size] for g in range(self.episode.groups)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


_worker: dict = {}


def _begin_worker(tasks: Sequence[BankTask], episode: Episode, threads: int) -> None:
    torch.set_num_threads(threads)
    _worker.update(tasks=tasks, episode=episode)


def _run_in_worker(work: tuple[Job, LstmPolicy, LstmPolicy | None]) -> Group:
    job, policy, averaged = work
    return run_group(job, policy, averaged, _worker["tasks"], _worker["episode"])
