"""A group's episodes over several processes: each trains its share as one batched program, on a core of its own.

The threads of one program wait for each other at the end of every operation, and between operations all but one idle.
Processes meet once a decision. What an episode does depends on its index alone, so the split changes no result.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from jel.errors import JelError
from jel.learn.rollout import EpisodeTask


class ParallelTask:
    """An `EpisodeTask` (see jel/learn/rollout.py) out of `workers` processes that hold one each, made there by `make()`.

    `make` is sent to them, so it must pickle. An exception in a worker is raised here; `JelError` if a worker is gone.
    The workers pay no heed to signals, which are for this process to answer, and end with it however it ends.
    """

    def __init__(self, make: Callable[[], EpisodeTask], workers: int, num_steps: int):
        self.num_steps = num_steps
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []
        context = multiprocessing.get_context(
            "forkserver"
        )  # a fork of this process would copy threads in the middle of their work
        context.set_forkserver_preload(["torch"])  # imported once, not by every worker
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        atexit.register(self.close)

    def reset(self, group: int, episodes: range) -> None:
        """Contiguous shares, as even as can be; with fewer episodes than workers the last ones have none."""
        n, self._first = len(self._workers), episodes.start
        bounds = [self._first + len(episodes) * i // n for i in range(n + 1)]
        self._shares = [range(a, b) for a, b in zip(bounds, bounds[1:])]
        self._ask("reset", lambda share: (group, share))

    def train(self, first_step: int, steps: int, factors: dict[str, Tensor]) -> None:
        def arguments(share: range) -> tuple:
            rows = slice(share.start - self._first, share.stop - self._first)
            return first_step, steps, {name: f[rows].tolist() for name, f in factors.items()}

        self._ask("train", arguments)

    def probe_loss(self) -> Tensor:
        return torch.tensor(sum(self._ask("probe_loss", lambda share: ()), []))

    def grad_norm(self) -> Tensor:
        return torch.tensor(sum(self._ask("grad_norm", lambda share: ()), []))

    def close(self) -> None:
        """End the workers, which wait for a question then or finish what they are at."""
        atexit.unregister(self.close)
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []

    def _ask(self, method: str, arguments: Callable[[range], tuple]) -> list:
        """Have every worker with a share call the method with the arguments of its share, at the same time; the answers."""
        busy = [(worker, share) for worker, share in zip(self._workers, self._shares) if share]
        answers = []
        try:
            for (_, connection), share in busy:
                connection.send((method, arguments(share)))
            for (_, connection), _ in busy:
                answers.append(connection.recv())
        except (EOFError, OSError):
            raise JelError(
                "a process that trains episodes has ended, perhaps for want of memory; go on from the last "
                "checkpoint, if need be with fewer such processes"
            ) from None
        for _, error, where in answers:
            if error is not None:
                raise error from RuntimeError(f"in a worker:\n{where}")
        return [answer for answer, _, _ in answers]


def _work(make: Callable[[], EpisodeTask], connection: Connection) -> None:
    """A worker: answers (method, arguments) with (result, None, "") or (None, exception, its traceback) until told no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    task = None
    with contextlib.suppress(EOFError, OSError):  # the other end is closed, or its process gone
        while True:
            method, arguments = connection.recv()
            try:
                task = task or make()
                connection.send((_call(task, method, arguments), None, ""))
            except Exception as e:
                connection.send((None, e, traceback.format_exc()))


def _call(task: EpisodeTask, method: str, arguments: tuple):
    """Tensors travel as lists of numbers: as tensors, they would take shared memory and a descriptor each."""
    arguments = [{k: torch.tensor(v) for k, v in a.items()} if isinstance(a, dict) else a for a in arguments]
    result = getattr(task, method)(*arguments)
    return result.tolist() if isinstance(result, Tensor) else result
