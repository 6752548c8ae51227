"""Lists of tensors cut and packed into pieces, so that reductions over all of them cost a few operations a piece.

Shapes: a piece is (E, n), E episodes side by side or 1. Big tensors are cut into slices, small ones packed together:
on a CPU a piece stays in the cache while several sums are made of it; elsewhere there are few of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CPU_PIECE, DEVICE_PIECE = 1 << 16, 1 << 25  # elements

Piece = list[tuple[int, int, int]]  # (index of the tensor, first element, the one after the last)


class Pieces:
    """How parameters are cut; tensors of the same shapes (gradients, momenta) are then taken piece by piece."""

    def __init__(self, params: Sequence[Tensor], runs: int | None):
        self.runs, self.elements = runs, 0
        self.reuse = all(p.device.type == "cpu" for p in params)  # new memory is dear on a CPU and cheap elsewhere
        self._pieces: list[Piece] = []
        filling: dict[tuple, tuple[Piece, int]] = {}
        for i, p in enumerate(params):
            size = CPU_PIECE if p.device.type == "cpu" else DEVICE_PIECE
            n = p.numel() // (runs or 1)
            self.elements += n
            for start in range(0, n, size):
                stop = min(n, start + size)
                piece, taken = filling.get((p.device, p.dtype), ([], size))
                if taken + stop - start > size:
                    piece, taken = [], 0
                    self._pieces.append(piece)
                piece.append((i, start, stop))
                filling[p.device, p.dtype] = piece, taken + stop - start

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor as (E, n)."""
        return [t.detach().reshape(self.runs or 1, -1) for t in tensors]

    @staticmethod
    def take(rows: Sequence[Tensor], piece: Piece) -> Tensor:
        """One piece of such rows, (E, n), in fp32 or wider; a view where it can be one."""
        parts = [rows[i][:, start:stop] for i, start, stop in piece]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return whole if whole.dtype == torch.float64 else whole.float()

    def copies(self, params: Sequence[Tensor], out: list[Tensor]) -> list[Tensor]:
        """The pieces of the parameters, copied: into `out` where it holds them already."""
        rows = self.rows(params)
        for j, piece in enumerate(self):
            if j < len(out):
                out[j].copy_(self.take(rows, piece))
            else:
                out.append(self.take(rows, piece).clone())
        return out


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows: (E, n), (E, n) -> (E,). On a CPU the bits of a row do not depend on the others."""
    if len(a) == 1 or a.device.type == "cpu":
        return torch.stack([torch.dot(x, y) for x, y in zip(a, b)])
    return torch.linalg.vecdot(a, b)


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of (E,) tensors, on the device of the first."""
    return torch.stack([v.to(values[0].device) for v in values]).sum(0)
