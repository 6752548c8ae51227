"""Token cache -> rows -> batches of (inputs, targets), with one integer for the position in the data.

A row holds T+1 tokens: inputs are its first T, targets its last T. Rows begin with <|bos|> and are packed best-fit: of
the next 1000 documents take the largest that fits the space left; if none fits, crop the shortest one to fill it and
drop its rest. The packing depends on document lengths alone, so it is planned once per (split, T) and kept beside the
cache; row r is then found without reading the rows before it.

Without a seed, rows come in file order. With one, the shards come in an order drawn from the seed, and a shard's rows
in a permutation drawn from (seed, shard). The last row of a split is followed by the first one, and every epoch has the
same order.

Legend: B rows of a batch on one rank, T tokens of a row, N documents of a shard's split, P pieces, R rows of a plan.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import zipfile
from bisect import bisect_left, bisect_right, insort
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import UserError, derive_seed, print0
from nanochat.files import atomic_file, locked
from nanochat.token_cache import TokenCache

BUFFER_DOCUMENTS = 1000  # from which the packer chooses
PREFETCH_BATCHES = 4  # prepared ahead of the training step


# -----------------------------------------------------------------------------
# packing


class RowPlan(NamedTuple):
    """How a shard's documents fill rows: row r is made of pieces row_ptr[r] to row_ptr[r+1]."""

    documents: (
        np.ndarray
    )  # (P,) int64: the index, in the shard's split, of the document whose first tokens the piece is
    lengths: np.ndarray  # (P,) int64: tokens of the piece
    row_ptr: np.ndarray  # (R + 1,) int64

    @property
    def n_rows(self) -> int:
        return len(self.row_ptr) - 1


def plan_rows(lengths: np.ndarray, capacity: int) -> RowPlan:
    """Pack documents of the given lengths, (N,) int64, into rows of `capacity` tokens; a row left unfilled is dropped.

    Among documents of equal length the earliest is taken. A choice is two bisections in a sorted buffer of keys: a
    document's key is length * N + index, which sorts by length and then by index.
    """
    n = max(len(lengths), 1)
    keys = (np.asarray(lengths, dtype=np.int64) * n + np.arange(len(lengths))).tolist()
    buffer, upcoming = sorted(keys[:BUFFER_DOCUMENTS]), iter(keys[BUFFER_DOCUMENTS:])
    documents, taken, row_ptr, space = [], [], [0], capacity
    while buffer:
        fits = bisect_right(buffer, space * n + n - 1)
        # The earliest of the longest documents that fit, or else the shortest of all.
        length, document = divmod(buffer.pop(bisect_left(buffer, buffer[fits - 1] // n * n) if fits else 0), n)
        if (key := next(upcoming, None)) is not None:
            insort(buffer, key)
        documents.append(document)
        taken.append(min(length, space))
        space -= taken[-1]
        if space == 0:
            row_ptr.append(len(taken))
            space = capacity
    n_pieces = row_ptr[-1]  # without those of an unfilled row
    columns = documents[:n_pieces], taken[:n_pieces], row_ptr
    return RowPlan(*(np.array(column, dtype=np.int64) for column in columns))


def permutation(n: int, seed: int) -> np.ndarray:
    """A random permutation of 0 ... n-1, (n,) int64: the same for a seed under every version of numpy.

    numpy keeps the raw output of its bit generators stable between versions, but not `Generator.permutation` (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


class PlannedShard(NamedTuple):
    """A shard whose rows are known."""

    shard: int
    starts: np.ndarray  # (P,) int64: where each piece begins in the shard's tokens
    plan: RowPlan
    order: np.ndarray | None  # (R,) int64: the plan's rows in the order they come out; None: as they are


class Rows:
    """All rows of one split at one length T, in the order of `seed` (None: file order), fetched by position.

    Shards are planned when they are first needed. Raises `UserError` on the first fetch of a split that has too little
    text for one row.
    """

    def __init__(self, cache: TokenCache, split: str, sequence_len: int, seed: int | None = None):
        self.cache, self.split, self.width, self.seed = cache, split, sequence_len + 1, seed
        self._planned: list[PlannedShard] = []
        self._ends = [0]  # rows up to and including the k-th planned shard
        self._unplanned = list(cache.shards(split))
        if seed is not None:
            order = permutation(len(self._unplanned), derive_seed(seed, "shards"))
            self._unplanned = [self._unplanned[i] for i in order]

    @property
    def n_rows(self) -> int:
        """Rows of the whole split: the epoch of a position is `position // n_rows`. Plans every shard."""
        while self._unplanned:
            self._plan_next()
        return self._ends[-1]

    def fetch(self, first: int, count: int) -> np.ndarray:
        """The rows at positions first, ..., first + count - 1, wrapping around at the end: (count, T+1) int64."""
        out, done = np.empty((count, self.width), dtype=np.int64), 0
        while done < count:
            row = first + done
            while row >= self._ends[-1] and self._unplanned:
                self._plan_next()
            if row >= self._ends[-1]:
                if not self.n_rows:
                    raise UserError(
                        f"the {self.split} split has too little text for one row of {self.width} tokens; "
                        "give more text, or shorten --max-seq-len"
                    )
                row %= self.n_rows
            k = bisect_right(self._ends, row) - 1
            row -= self._ends[k]
            n = min(count - done, self._planned[k].plan.n_rows - row)
            out[done : done + n] = self._gather(self._planned[k], row, n)
            done += n
        return out

    def _gather(self, planned: PlannedShard, first: int, count: int) -> np.ndarray:
        """Rows first, ..., first + count - 1 of one shard: (count, T+1)."""
        shard, starts, plan, order = planned
        if order is None:
            pieces = slice(plan.row_ptr[first], plan.row_ptr[first + count])
        else:
            rows = order[first : first + count]
            pieces = concatenated_ranges(plan.row_ptr[rows], plan.row_ptr[rows + 1] - plan.row_ptr[rows])
        indices = concatenated_ranges(starts[pieces], plan.lengths[pieces])
        return self.cache.tokens(shard)[indices].reshape(count, self.width)

    def _plan_next(self) -> None:
        shard = self._unplanned[0]
        starts, lengths = self.cache.documents(self.split, shard)
        path = self.cache.folder / f"plan_{self.split}_{self.width - 1}_{shard:05d}.npz"
        with locked(self.cache.folder):  # of several processes one plans, the others read
            plan = self._load(path, lengths)
            if plan is None:
                plan = plan_rows(lengths, self.width)
                with atomic_file(path) as f:
                    np.savez(f, **plan._asdict())
        order = None if self.seed is None else permutation(plan.n_rows, derive_seed(self.seed, "rows", shard))
        self._unplanned.pop(0)
        self._planned.append(PlannedShard(shard, starts[plan.documents], plan, order))
        self._ends.append(self._ends[-1] + plan.n_rows)

    def _load(self, path: Path, document_lengths: np.ndarray) -> RowPlan | None:
        """The saved plan, or None if there is none or it cannot belong to documents of these lengths."""
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as saved:
                plan = RowPlan(*(saved[name] for name in RowPlan._fields))
            filled = np.add.reduceat(plan.lengths, plan.row_ptr[:-1]) if plan.n_rows else plan.lengths
            if (plan.lengths <= document_lengths[plan.documents]).all() and (filled == self.width).all():
                return plan
            reason = "it does not fit the documents"
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as e:
            reason = str(e)
        print0(f"row plan {path} is damaged ({reason}); planning it again")
        return None


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`lengths[0]` integers from starts[0] on, then `lengths[1]` from starts[1] on, ...: (sum(lengths),) int64."""
    ends = np.cumsum(lengths)
    shift = starts - (ends - lengths)  # element j lies at its start + (j - where its range begins)
    return np.repeat(shift, lengths) + np.arange(ends[-1])


# -----------------------------------------------------------------------------
# batches


def stage(rows: np.ndarray) -> torch.Tensor:
    """(B, T+1) rows -> (2, B, T) int64, inputs and targets in one tensor: one copy to the device."""
    return torch.from_numpy(np.stack([rows[:, :-1], rows[:, 1:]]))


class DataLoader:
    """Batches of a split by step; a thread prepares the next ones (in pinned memory for CUDA).

    An optimizer step takes `rows_per_step` rows (default: one micro-step), whatever the number of ranks and the batch
    size: row b of a batch is the row at position
    `start_row + step * rows_per_step + micro_step * (B * world_size) + rank * B + b`
    of the split, in the order of `seed` (None: file order).
    Raises `UserError` unless a step is a whole number of batches on every rank. `close` ends the thread.
    """

    def __init__(
        self,
        cache: TokenCache,
        split: str,
        batch_size: int,
        sequence_len: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        start_row: int = 0,
        rows_per_step: int | None = None,
        seed: int | None = None,
    ):
        self._micro_rows = batch_size * world_size
        rows_per_step = self._micro_rows if rows_per_step is None else rows_per_step
        if rows_per_step < 1 or rows_per_step % self._micro_rows:
            raise UserError(
                f"{rows_per_step} rows a step are not a multiple of {batch_size} rows a batch x {world_size} "
                "ranks; change --total-batch-size or --device-batch-size"
            )
        self.micro_steps = rows_per_step // self._micro_rows
        self._rows = Rows(cache, split, sequence_len, seed)
        self._batch_size, self._device = batch_size, torch.device(device)
        self._first_row = start_row + rank * batch_size
        self._thread: threading.Thread | None = None
        self._upcoming: int | None = None  # the next batch of the thread, counted in micro-steps from step 0

    def get(self, step: int, micro_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, contiguous (B, T) int64 on the device. Batches may be asked for in any order.

        Another batch than the next one restarts the thread. An exception in the thread is raised here.
        """
        position = step * self.micro_steps + micro_step
        if position != self._upcoming:
            self.close()
            self._start(position)
        staged = self._ready.get()
        if isinstance(staged, BaseException):
            self.close()
            raise staged
        self._upcoming = position + 1
        return staged.to(self._device, non_blocking=True).unbind(0)

    def close(self) -> None:
        """End the thread. A later `get` starts another."""
        if self._thread is None:
            return
        self._stop.set()
        while not self._ready.empty():  # makes room for a batch that the thread may be about to put there
            self._ready.get_nowait()
        self._thread.join()
        self._thread = self._upcoming = None

    def _start(self, position: int) -> None:
        self._ready, self._stop = queue.Queue(PREFETCH_BATCHES), threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(position,), name="dataloader")
        self._thread.start()

    def _prefetch(self, position: int) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # else pinning would create a context on device 0
            while not self._is_over():
                staged = stage(self._rows.fetch(self._first_row + position * self._micro_rows, self._batch_size))
                self._put(staged.pin_memory() if self._device.type == "cuda" else staged)
                position += 1
        except BaseException as e:
            self._put(e)

    def _put(self, item: torch.Tensor | BaseException) -> None:
        """Wait for room in the queue, unless nobody will take anything out of it any more."""
        while not self._is_over():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=0.2)

    def _is_over(self) -> bool:
        """Closed, or the program ends. A daemon thread would be killed at exit instead, in C++ code with SIGABRT."""
        return self._stop.is_set() or not threading.main_thread().is_alive()


def fixed_batches(
    cache: TokenCache,
    split: str,
    batch_size: int,
    sequence_len: int,
    n_batches: int,
    device: torch.device,
    start_row: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`n_batches` batches of consecutive rows in file order, each (inputs, targets) as from a `DataLoader`."""
    rows = Rows(cache, split, sequence_len)
    return [stage(rows.fetch(start_row + i * batch_size, batch_size)).to(device).unbind(0) for i in range(n_batches)]
