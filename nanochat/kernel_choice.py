"""Choosing among kernels that compute the same: each is checked against a reference, and timed on this device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from nanochat.common import print0

PREFERENCE = 1.03  # an earlier candidate is kept unless a later one is faster by more than this


def fastest(
    what: str,
    candidates: Mapping[str, Callable[[], tuple[Tensor, ...]]],
    reference: str,
    tolerance: float,
    rounds: int = 10,
) -> str:
    """The name of the fastest candidate whose tensors agree with those of `reference`; prints what was found.

    Two tensors agree when the norm of their difference is at most `tolerance` times the norm of the reference's.
    A candidate that raises or disagrees is refused, with the reason printed. Raises RuntimeError if none is left.
    """
    wanted = [t.float() for t in candidates[reference]()]
    seconds: dict[str, float] = {}
    said = []
    for name, run in candidates.items():
        try:
            error = max(float((t.float() - w).norm() / w.norm()) for t, w in zip(run(), wanted, strict=True))
            if not error <= tolerance:
                raise ArithmeticError(f"its result differs from {reference}'s by {error:.2g}")
            seconds[name] = _seconds(run, rounds)
            said.append(f"{name} {1e3 * seconds[name]:.2f} ms")
        except Exception as error:  # whatever a package that we do not know raises
            reason = (str(error).strip().splitlines() or [""])[0]
            said.append(f"{name} refused ({type(error).__name__}: {reason})")
    if torch.cuda.is_available():  # the run starts with the memory, and the record of its peak, that it would have had
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not seconds:
        raise RuntimeError(f"{what}: no kernel works here: {'; '.join(said)}")
    best = min(seconds.values())
    name = next(name for name, s in seconds.items() if s <= PREFERENCE * best)
    print0(f"{what}: {name}, by measurement: {'; '.join(said)}")
    return name


def _seconds(run: Callable, rounds: int) -> float:
    """Median seconds of a call, which has been made before."""
    cuda, times = torch.cuda.is_available(), []
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)
