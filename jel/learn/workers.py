"""A group's episodes over several processes: each trains its share as one batched program, on a core of its own.

The threads of one program wait for each other at the end of every operation, and between operations all but one idle.
Processes meet once a decision. What an episode does depends on its index alone, so the split changes no result.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.process
import signal
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.knobs import Multipliers
from jel.tasks.base import Task


class WorkerPool:
    """`workers` processes that hold one object each, made there by `make()`, and answer calls of its methods.

    `make` is sent to them, so it must pickle. The workers ignore signals, which are for this process to answer, and
    end with it however it ends.
    """

    def __init__(self, make: Callable[[], Any], workers: int):
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        # not fork: it would copy this process's threads in the middle of their work
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])  # imported once, not by every worker
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        atexit.register(self.close)

    def __len__(self) -> int:
        return len(self._workers)

    def call(self, method: str, arguments: dict[int, tuple]) -> list:
        """`method(*arguments[i])` in each worker i named, at the same time; the results in that order.

        An exception in a worker is raised here; `JelError` if a worker is gone.
        """
        answers = []
        try:
            for i, given in arguments.items():
                self._workers[i][1].send((method, _packed(given)))
            for i in arguments:
                answers.append(self._workers[i][1].recv())
        except (EOFError, OSError):
            raise JelError(
                "a process that trains episodes has ended, perhaps for lack of memory; go on from the last "
                "checkpoint, if need be with fewer such processes"
            ) from None
        for _, error, where in answers:
            if error is not None:
                raise error from RuntimeError(f"in a worker:\n{where}")
        return [_unpacked(answer) for answer, _, _ in answers]

    def close(self) -> None:
        """End the workers: at once if they wait for a call, else when they have finished it."""
        atexit.unregister(self.close)
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers = []


class ParallelTask:
    """A `Task` (see jel/tasks/base.py) out of `workers` processes with one each, made there by `make()`.

    `groups` and `num_steps` are those of the task that `make` makes.
    """

    def __init__(
        self, make: Callable[[], Task], workers: int, groups: tuple[str, ...], num_steps: Callable[[int], int]
    ):
        self.groups, self.num_steps = groups, num_steps
        self._pool = WorkerPool(make, workers)
        self._shares: dict[int, range] = {}

    def reset(self, group: int, episodes: range) -> None:
        """Contiguous shares, as even as can be; with fewer episodes than workers some have none."""
        n, self._first = len(self._pool), episodes.start
        bounds = [self._first + len(episodes) * i // n for i in range(n + 1)]
        shares = [range(a, b) for a, b in zip(bounds, bounds[1:])]
        self._shares = {i: share for i, share in enumerate(shares) if share}
        self._each("reset", lambda rows, share: (group, share))

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        def share_of(rows: slice, share: range) -> tuple:
            mine = {
                group: {key: torch.as_tensor(value)[rows] for key, value in own.items()}
                for group, own in multipliers.items()
            }
            return first_step, steps, mine

        self._each("train", share_of)

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        parts = self._each("observe", lambda rows, share: (list(names),))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def save(self, slot: int, episodes: Tensor) -> None:
        self._each("save", lambda rows, share: (slot, episodes[rows]))

    def load(self, slot: int, episodes: Tensor) -> None:
        self._each("load", lambda rows, share: (slot, episodes[rows]))

    def close(self) -> None:
        self._pool.close()

    def _each(self, method: str, arguments: Callable[[slice, range], tuple]) -> list:
        rows = lambda share: slice(share.start - self._first, share.stop - self._first)
        return self._pool.call(method, {i: arguments(rows(share), share) for i, share in self._shares.items()})


# -----------------------------------------------------------------------------
# in a worker


def _serve(make: Callable[[], Any], connection: Connection) -> None:
    """Answer (method, arguments) with (result, None, "") or (None, exception, its traceback) until the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    served = None
    with contextlib.suppress(EOFError, OSError):  # the other end is closed, or its process gone
        while True:
            method, arguments = connection.recv()
            try:
                served = served or make()
                connection.send((_packed(getattr(served, method)(*_unpacked(arguments))), None, ""))
            except Exception as e:
                connection.send((None, e, traceback.format_exc()))


@dataclass(frozen=True)
class _Numbers:
    """A tensor's values on their way: as a tensor it would take shared memory and a file descriptor."""

    values: list
    dtype: torch.dtype


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Numbers(value.tolist(), value.dtype)
    if isinstance(value, dict):
        return {key: _packed(v) for key, v in value.items()}
    return tuple(map(_packed, value)) if isinstance(value, tuple) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Numbers):
        return torch.tensor(value.values, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _unpacked(v) for key, v in value.items()}
    return tuple(map(_unpacked, value)) if isinstance(value, tuple) else value
