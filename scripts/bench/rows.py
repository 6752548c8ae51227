"""The comparisons of the benchmark: each function times one question and returns its rows of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import peak_flops
from scripts.bench.shapes import MID, describe, tokens
from scripts.bench.table import Row, compared
from scripts.bench.worker import Worker, result_of, seconds_of

EPISODES, EPISODE_STEPS = 8, 3  # steps of each episode in a turn
Shapes = Sequence[tuple[str, dict, int]]  # (name, shape, steps a turn, or steps of an episode)


# -----------------------------------------------------------------------------
# a training step


def training_rows(device: str, shapes: Shapes, ours: Worker, straight: Worker, seconds: float) -> list[Row]:
    """Ours as `base_train` runs it (eager on a CPU, compiled on CUDA) against the straightforward form, eager."""
    rows = []
    for name, shape, turns in shapes:
        spec = {"case": "step", "turns": turns, **shape}
        row = compared(
            f"training step, {name} ({describe(shape)})",
            "tokens/s",
            turns * tokens(shape),
            partial(seconds_of, ours, {**spec, "form": "ours"}),
            "straightforward, eager",
            partial(seconds_of, straight, {**spec, "form": "straight"}),
            seconds / len(shapes),
            ">= 1.3x",
        )
        if device == "cuda":
            with torch.device("meta"):
                flops = GPT(GPTConfig(**shape["model"])).flops_per_token() * row.ours
            row = replace(row, note=mfu_note(torch.cuda.get_device_name(), flops))
        rows.append(row)
    return rows


def compiled_straight_rows(shapes: Shapes, ours: Worker, straight: Worker, seconds: float) -> list[Row]:
    """Ours as `base_train` runs it against the straightforward form under torch.compile, as its code base runs it."""
    rows = []
    for name, shape, turns in shapes:
        spec = {"case": "step", "turns": turns, **shape}
        other = {**spec, "form": "straight", "compiled": True}
        rows.append(
            compared(
                f"training step, {name} ({describe(shape)})",
                "tokens/s",
                turns * tokens(shape),
                partial(seconds_of, ours, {**spec, "form": "ours"}),
                "straightforward, compiled",
                partial(seconds_of, straight, other),
                seconds / len(shapes),
                note=start_note(straight, other),
            )
        )
    return rows


def compiled_ours_row(shape: dict, worker: Worker, seconds: float) -> Row:
    """Ours on a CPU: the step eager, as `base_train` runs it there, against the same step with the model compiled."""
    spec = {"case": "step", "form": "ours", "turns": 4, **shape}
    other = {**spec, "compiled": True}
    return compared(
        f"training step, eager on a CPU ({describe(shape)})",
        "tokens/s",
        4 * tokens(shape),
        partial(seconds_of, worker, spec),
        "ours, compiled",
        partial(seconds_of, worker, other),
        seconds,
        note=start_note(worker, other),
    )


def start_note(worker: Worker, spec: dict) -> str:
    """Runs the compiled spec for the first time: says how long that took, which the ratio leaves out."""
    return f"compiled in its first {spec['turns']} steps, {seconds_of(worker, spec):.0f} s, not counted"


def bf16_row(straight: Worker, seconds: float) -> Row:
    """Muon in fp32, as ours is on every CPU, against bf16, in the straightforward form."""
    spec = {"case": "step", "form": "straight", **MID}
    return compared(
        f"straightforward, Muon in fp32 ({describe(MID)})",
        "tokens/s",
        tokens(MID),
        partial(seconds_of, straight, spec),
        "in bf16",
        partial(seconds_of, straight, {**spec, "bf16": True}),
        seconds,
        note=f"bf16 among this CPU's features: {'yes' if has_native_bf16() else 'no'}",
    )


def has_native_bf16() -> bool:
    """Whether /proc/cpuinfo lists a bf16 extension (AVX512, AMX, Arm)."""
    try:
        flags = set(open("/proc/cpuinfo").read().split())
    except OSError:
        return False
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def mfu_note(device_name: str, flops: float) -> str:
    """Model FLOPs utilisation at so many FLOP/s, by the peak of the first known name in `device_name`."""
    peak = peak_flops(device_name)
    if peak is None:
        return f"{flops / 1e12:.0f} TFLOP/s, peak of {device_name} unknown"
    return f"MFU {flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"


def recompilation_row(shape: dict, worker: Worker) -> Row:
    """Raises `UserError` if a decision makes a program compile again."""
    graphs = result_of(worker, {"case": "recompilations", "form": "ours", **shape})["graphs"]
    if graphs:
        raise UserError(
            f"{graphs} programs were compiled again during a run with 12 decisions; "
            "a hyperparameter enters one as a constant"
        )
    return Row("recompilations, 120 steps with 12 decisions", "programs", graphs, target="0")


# -----------------------------------------------------------------------------
# several runs at once


def episode_rows(device: str, shapes: Shapes, worker: Worker, seconds: float) -> list[Row]:
    """EPISODES episodes together against one after another.

    Together is one batched program; on a CPU also one process per core, each with its share of the episodes as one
    program, as `meta_train` runs them there.
    """
    rows, processes = [], min(EPISODES, os.cpu_count()) if device == "cpu" else 1
    ways = {"as one program": 1, **({f"in {processes} processes": processes} if processes > 1 else {})}
    for name, shape, num_iterations in shapes:
        spec = {"case": "episodes", "episodes": EPISODES, "steps": EPISODE_STEPS, **shape}
        for way, workers in ways.items():
            rows.append(
                compared(
                    f"{EPISODES} episodes {way}, {name} ({describe(shape)})",
                    "episodes/s",
                    EPISODES * EPISODE_STEPS / num_iterations,
                    partial(seconds_of, worker, {**spec, "together": EPISODES, "workers": workers}),
                    "one after another",
                    partial(seconds_of, worker, {**spec, "together": 1}),
                    seconds / len(shapes) / len(ways),
                    ">= 3x" if device == "cuda" else ">= 2.5x",
                )
            )
    return rows


def sweep_rows(shape: dict, workers: list[Worker], seconds: float) -> list[Row]:
    """8 configurations: one program with a rate per run, two processes side by side, one after another."""
    threads, spec = os.cpu_count(), {"case": "step", "form": "ours", **shape}
    batched = {**spec, "runs": 8, "threads": threads}
    others = {
        "two processes side by side": (workers, {**spec, "turns": 4, "threads": max(1, threads // 2)}),
        "one after another": (workers[0], {**spec, "turns": 8, "threads": threads}),
    }
    return [
        compared(
            f"8 configurations as one program ({describe(shape)})",
            "steps/s",
            8,
            partial(seconds_of, workers[0], batched),
            name,
            partial(seconds_of, *other),
            seconds / len(others),
        )
        for name, other in others.items()
    ]


# -----------------------------------------------------------------------------
# data, import, controller


def data_rows(found: dict, fastest: float) -> list[Row]:
    """From the result of the case "data" and the fastest step's tokens/s."""
    note = f"vocabulary of {found['vocab_size']}"
    rows = [Row("token cache, built", "MB/s a core", found["cache_mb_per_s"], target=">= 5", note=note)]
    for T, rate in found["loader"].items():
        against = "the fastest step above", fastest, rate / fastest
        rows.append(Row(f"loader, T = {T}", "tokens/s", rate, *against, target=">= 20x"))
    return rows


def import_row(repeats: int = 5) -> Row:
    """Seconds that `import jel` takes in a process that has imported torch."""
    program = "import time, torch; start = time.perf_counter(); import jel; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", program]
    seconds = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(repeats)
    ]
    return Row("import jel, beyond torch's own", "s", median(seconds), rounds=repeats, target="< 0.2")


def controller_rows(shape: dict, interval: int, worker: Worker, step_seconds: float) -> list[Row]:
    """The hook at a step with a decision, and its share of the time between two decisions."""
    ms = result_of(worker, {"case": "controller", "model": shape["model"]})["ms"]
    percent = 100 * ms / 1e3 / (interval * step_seconds)
    return [
        Row("controller, a decision and the param groups", "ms", ms, rounds=1000, target="< 0.1"),
        Row(f"controller, a decision every {interval} steps", "% of a run", percent, target="< 0.05"),
    ]
