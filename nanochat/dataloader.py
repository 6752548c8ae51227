"""Token cache -> rows -> batches of (inputs, targets), with one integer for the position in the data.

A row holds T+1 tokens: inputs are its first T, targets its last T. Rows begin with <|bos|> and are packed best-fit: of
the next 1000 documents take the largest that fits the space left; if none fits, crop the shortest to fill it and drop
the rest of it. The packing depends on document lengths alone, so it is planned once per (split, T) and kept beside the
cache; row r is then found without reading the rows before it. After the last row of a split the first one follows
again, in the same order in every epoch.

Legend: B rows of a batch on one rank, T tokens of a row, N documents of a shard's split, P pieces, R rows of a plan.
"""

from __future__ import annotations

import queue
import threading
import zipfile
from bisect import bisect_left, bisect_right, insort
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import UserError, print0
from nanochat.token_cache import TokenCache, atomic_file, locked

BUFFER_DOCUMENTS = 1000  # among so many the packer chooses
PREFETCH_BATCHES = 4  # ready ahead of the training step


# -----------------------------------------------------------------------------
# packing


class RowPlan(NamedTuple):
    """How a shard's documents fill rows: row r is made of pieces row_ptr[r] to row_ptr[r+1]."""

    documents: np.ndarray  # (P,) int64, which document of the shard's split; pieces are its first tokens
    lengths: np.ndarray  # (P,) int64, how many of them
    row_ptr: np.ndarray  # (R + 1,) int64

    @property
    def n_rows(self) -> int:
        return len(self.row_ptr) - 1


def plan_rows(lengths: np.ndarray, capacity: int) -> RowPlan:
    """Pack documents of the given lengths, (N,) int64, into rows of `capacity` tokens. A last, unfilled row is dropped.

    Among documents of equal length the earlier one goes first. A choice is two bisections in a sorted buffer: a
    document's key is length * N + its index, which sorts by length and then by order.
    """
    n = max(len(lengths), 1)
    keys = (np.asarray(lengths, dtype=np.int64) * n + np.arange(len(lengths))).tolist()
    buffer, upcoming = sorted(keys[:BUFFER_DOCUMENTS]), iter(keys[BUFFER_DOCUMENTS:])
    documents, taken, row_ptr, space = [], [], [0], capacity
    while buffer:
        fits = bisect_right(buffer, space * n + n - 1)
        # The first of those as long as the largest that fits, or else the shortest of all.
        length, document = divmod(buffer.pop(bisect_left(buffer, buffer[fits - 1] // n * n) if fits else 0), n)
        if (key := next(upcoming, None)) is not None:
            insort(buffer, key)
        documents.append(document)
        taken.append(min(length, space))
        space -= taken[-1]
        if space == 0:
            row_ptr.append(len(taken))
            space = capacity
    whole = slice(row_ptr[-1])
    return RowPlan(*(np.array(column, dtype=np.int64) for column in (documents[whole], taken[whole], row_ptr)))


class Rows:
    """Every row of one split at one length T, fetched by global row index. Plans shards only as far as they are needed.

    Raises `UserError` on the first fetch of a split that has too little text for one row.
    """

    def __init__(self, cache: TokenCache, split: str, sequence_len: int):
        self.cache, self.split, self.width = cache, split, sequence_len + 1
        self._plans: list[tuple[int, np.ndarray, RowPlan]] = []  # (shard, first token of each piece, plan)
        self._ends = [0]  # rows up to and including the k-th planned shard
        self._unplanned = list(cache.shards(split))

    @property
    def n_rows(self) -> int:
        """Rows of the whole split: an epoch is `row // n_rows`. Plans every shard."""
        while self._unplanned:
            self._plan_next()
        return self._ends[-1]

    def fetch(self, first: int, count: int) -> np.ndarray:
        """Rows first, ..., first + count - 1, wrapping around at the end of the split: (count, T+1) int64."""
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
            shard, starts, plan = self._plans[k]
            n = min(count - done, plan.n_rows - row)
            pieces = slice(plan.row_ptr[row], plan.row_ptr[row + n])
            lengths = plan.lengths[pieces]
            # Token j of the block lies at (start of its piece) + (j - where the piece begins in the block).
            shift = starts[pieces] - (np.cumsum(lengths) - lengths)
            out[done : done + n].flat = self.cache.tokens(shard)[np.repeat(shift, lengths) + np.arange(n * self.width)]
            done += n
        return out

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
        self._unplanned.pop(0)
        self._plans.append((shard, starts[plan.documents], plan))
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
        print0(f"row plan {path} is damaged ({reason}); planning anew")
        return None


# -----------------------------------------------------------------------------
# batches


def stage(rows: np.ndarray) -> torch.Tensor:
    """(B, T+1) rows -> (2, B, T) int64, inputs and targets in one tensor, so that they travel in one copy."""
    return torch.from_numpy(np.stack([rows[:, :-1], rows[:, 1:]]))


class DataLoader:
    """Batches of a split by step, the following ones prepared by a thread meanwhile (in pinned memory for CUDA).

    One optimizer step consumes `rows_per_step` rows (default: one micro-step), whatever the number of ranks and the
    batch size: row b of a batch is the split's row
    `start_row + step * rows_per_step + micro_step * (B * world_size) + rank * B + b`.
    Raises `UserError` if the ranks' batches do not tile a step. Call `close` when done: it ends the thread.
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
                f"{rows_per_step} rows a step are no multiple of {batch_size} rows a batch x {world_size} "
                "ranks; change --total-batch-size or --device-batch-size"
            )
        self.micro_steps = rows_per_step // self._micro_rows
        self._rows = Rows(cache, split, sequence_len)
        self._batch_size, self._device = batch_size, torch.device(device)
        self._first_row = start_row + rank * batch_size
        self._thread: threading.Thread | None = None
        self._upcoming: int | None = None  # the micro-step, counted from the start of the data, that comes out next

    def get(self, step: int, micro_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, contiguous (B, T) int64 on the device. Any position may be asked for; in order is fast.

        Raises what went wrong in the thread.
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
        while not self._ready.empty():  # room for the one batch that the thread may still be about to hand over
            self._ready.get_nowait()
        self._thread.join()
        self._thread = self._upcoming = None

    def _start(self, position: int) -> None:
        self._ready, self._stop = queue.Queue(PREFETCH_BATCHES), threading.Event()
        self._thread = threading.Thread(target=self._prefetch, args=(position,), name="dataloader", daemon=True)
        self._thread.start()

    def _prefetch(self, position: int) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a new thread starts on device 0, and pinning would open it
            while not self._stop.is_set():
                staged = stage(self._rows.fetch(self._first_row + position * self._micro_rows, self._batch_size))
                self._ready.put(staged.pin_memory() if self._device.type == "cuda" else staged)
                position += 1
        except BaseException as e:
            self._ready.put(e)


def fixed_batches(
    cache: TokenCache,
    split: str,
    batch_size: int,
    sequence_len: int,
    n_batches: int,
    device: torch.device,
    start_row: int = 0,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`n_batches` batches from consecutive rows, each (inputs, targets) like a `DataLoader`'s: for probe losses."""
    rows = Rows(cache, split, sequence_len)
    return [stage(rows.fetch(start_row + i * batch_size, batch_size)).to(device).unbind(0) for i in range(n_batches)]
