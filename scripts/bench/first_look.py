"""The rows to have first on a GPU: each is measured alone and written as it ends, so that a cut leaves the others.

Which micro-batch, loss kernel and attention kernel are best is read off them. Runs on a CPU too, for rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from nanochat.attention import ATTENTIONS
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_head import LOSSES
from nanochat.mlp_kernel import MLPS
from scripts.bench.rows import compiled_straight_rows, controller_rows, mfu_note, recompilation_row
from scripts.bench.shapes import describe, tokens
from scripts.bench.table import Row
from scripts.bench.worker import Worker, interleaved, seconds_of

EPISODES = (1, 8, 16, 32)
EPISODE_STEPS = 3  # of each in a turn
Look = tuple[str, Callable[[], list[Row]]]


def looks(
    step: dict, episode: dict, num_iterations: int, interval: int, worker: Worker, cuda: bool, seconds: float
) -> Iterator[Look]:
    """(name, measurement) in the order of importance. `seconds` of timing in all; compilation comes on top."""
    share = seconds / 20
    times: dict[int, float] = {}  # seconds of a step by rows
    for factor in (1, 2, 4):
        if step["accumulation"] % factor == 0:
            shape = {**step, "rows": factor * step["rows"], "accumulation": step["accumulation"] // factor}
            yield f"step, {shape['rows']} rows", partial(step_row, shape, worker, share, cuda, times)
    yield "decision", lambda: controller_rows(step, interval, worker, times.get(step["rows"], float("nan")))
    one = {**step, "accumulation": 1}

    def kernels(what: str, names: tuple[str, ...]) -> Iterator[Look]:
        for name in names:
            if name != "auto" and not (cuda and name == "chunked"):  # chunks are for eager mode on a CPU
                spec = {**one, "prepare": {what: name}}
                yield f"{what} {name}", partial(step_row, spec, worker, share, cuda, {}, f", {what} {name}")

    yield from kernels("loss", LOSSES)
    yield from kernels("attention", ATTENTIONS)
    rates: dict[int, float] = {}  # episodes/s by E
    for E in EPISODES:
        yield f"{E} episodes", partial(episodes_row, E, episode, num_iterations, worker, share, rates)
    yield "recompilations", lambda: [recompilation_row(step, worker)]
    if cuda:
        for E in EPISODES[:2]:
            shape = {**episode, "cuda_graphs": True}
            yield f"{E} episodes, CUDA graphs", partial(graphs_row, E, shape, num_iterations, worker, share, rates)
    yield from kernels("mlp", MLPS)
    if cuda:
        yield "twin", lambda: compiled_straight_rows([("the run's", one, 1)], worker, worker, share)


def step_row(shape: dict, worker: Worker, seconds: float, cuda: bool, times: dict[int, float], what: str = ""):
    """A training step as `base_train` takes it: tokens/s, and MFU on a GPU. Its seconds go into `times`."""
    taken = median(timed(worker, {"case": "step", "form": "ours", **shape}, seconds))
    times[shape["rows"]] = taken
    rate = tokens(shape) / taken
    note = ""
    if cuda:
        with torch.device("meta"):
            flops = GPT(GPTConfig(**shape["model"])).flops_per_token() * rate
        note = mfu_note(torch.cuda.get_device_name(), flops)
    name = f"step{what} ({describe(shape)} x {shape['accumulation']})"
    return [Row(name, "tokens/s", rate, note="; ".join(filter(None, (note, f"{1e3 * taken:.1f} ms"))))]


def episodes_row(E: int, shape: dict, num_iterations: int, worker: Worker, seconds: float, rates: dict[int, float]):
    """E episodes as one program: episodes/s, and how many times the rate of one at a time."""
    spec = {"case": "episodes", "episodes": E, "together": E, "steps": EPISODE_STEPS, **shape}
    rates[E] = E * EPISODE_STEPS / num_iterations / median(timed(worker, spec, seconds))
    name = f"{E} episodes as one program ({describe(shape)})"
    if E == 1 or 1 not in rates:
        return [Row(name, "episodes/s", rates[E])]
    return [Row(name, "episodes/s", rates[E], "one at a time", rates[1], rates[E] / rates[1], target=">= 3x")]


def graphs_row(E: int, shape: dict, num_iterations: int, worker: Worker, seconds: float, rates: dict[int, float]):
    """E episodes replayed from a CUDA graph: episodes/s, and how many times the rate without, by `rates`."""
    (row,) = episodes_row(E, shape, num_iterations, worker, seconds, {})
    row = replace(row, what=f"{row.what}, CUDA graphs")
    if E not in rates:
        return [row]
    return [replace(row, against="without CUDA graphs", other=rates[E], ratio=row.ours / rates[E])]


def timed(worker: Worker, spec: dict, seconds: float) -> list[float]:
    """Seconds of each turn, after one that compiles and is not counted."""
    seconds_of(worker, spec)
    return interleaved({"": partial(seconds_of, worker, spec)}, seconds)[""]
