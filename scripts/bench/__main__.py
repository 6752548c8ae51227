"""How fast this is: every figure beside what it is compared with, both timed in turn (A B A B ...) on this machine.

    python -m scripts.bench --quick          under 3 minutes on 2 cores
    python -m scripts.bench --seconds 1200   steadier, and torch.compile on a CPU too
    python -m scripts.bench --preset paper   the paper's shapes, on a GPU

Writes $NANOCHAT_BASE_DIR/report/: bench.json, growth.png, growth.svg. The rows are the only speed figures to quote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median, quantiles

import torch

from nanochat.common import UserError, base_dir, init_compute, print0, run_main
from nanochat.files import write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.run_log import environment_record, format_seconds
from scripts import base_train, meta_train
from scripts.bench.growth import growth_figure, measure
from scripts.bench.worker import STEPS, Worker, ask, in_turn, run
from scripts.presets import PRESETS, add_preset_flag, parse_with_preset, resolve_preset
from scripts.report.figures import save_figure

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10": 125e12,
    "L4": 121e12,
}  # bf16, dense
QUICK_SECONDS, FULL_SECONDS = 60, 400
EPISODES = 8


@dataclass(frozen=True)
class Row:
    """One line of the table. With something to compare with: `ratio` is the median over rounds of ours over its rate."""

    what: str
    unit: str
    ours: float
    against: str = ""
    other: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    rounds: int = 1
    target: str = ""
    note: str = ""


def compared(
    what: str,
    unit: str,
    amount: float,
    ours: Callable[[], float],
    against: str,
    other: Callable[[], float],
    seconds: float,
    target: str = "",
    note: str = "",
) -> Row:
    """Time both sides in turn: each returns the seconds that it takes for `amount` of the unit."""
    times = in_turn({"ours": ours, "other": other}, seconds)
    ratios = [b / a for a, b in zip(times["ours"], times["other"])]
    low, _, high = quantiles(ratios, n=4)
    rates = [amount / median(times[side]) for side in ("ours", "other")]
    return Row(what, unit, rates[0], against, rates[1], median(ratios), (low, high), len(ratios), target, note)


def line(row: Row) -> str:
    """One line of the table."""
    parts = [f"{row.what:<52} {row.ours:>12,.4g} {row.unit}"]
    if row.other is not None:
        spread = " ({:.2f}-{:.2f}, {} rounds)".format(*row.quartiles, row.rounds) if row.quartiles else ""
        parts.append(f"{row.ratio:.3g}x{spread} {row.against}: {row.other:,.4g}")
    return "; ".join([*parts, *filter(None, (row.target and f"target {row.target}", row.note))])


# -----------------------------------------------------------------------------
# shapes


def preset_shapes(preset: str) -> tuple[dict, dict, argparse.Namespace, argparse.Namespace]:
    """The preset's training step and episode as {"model", "rows"}, and its flags for both."""
    train = parse_with_preset(base_train.flags(), "base_train", ["--preset", preset])
    meta = parse_with_preset(meta_train.flags(), "meta_train", ["--preset", preset])
    vocab_size = PRESETS[preset].get("tok_train", {}).get("vocab_size", GPTConfig.vocab_size)

    def model(args, sequence_len):
        config = GPTConfig.from_depth(
            args.depth,
            args.aspect_ratio,
            args.head_dim,
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            window_pattern=args.window_pattern,
        )
        return asdict(config)

    step = {
        "model": model(train, train.max_seq_len),
        "rows": train.device_batch_size,
        "accumulation": train.total_batch_size // (train.device_batch_size * train.max_seq_len),
    }
    return step, {"model": model(meta, meta.episode_seq_len), "rows": meta.episode_batch_size}, train, meta


MID = {
    "model": asdict(GPTConfig(sequence_len=256, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)),
    "rows": 4,
}
SMALL_EPISODE = {
    "model": asdict(GPTConfig(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)),
    "rows": 4,
}


def tokens(shape: dict) -> int:
    return shape["rows"] * shape["model"]["sequence_len"] * shape.get("accumulation", 1)


def describe(shape: dict) -> str:
    m = shape["model"]
    return f"{m['n_layer']} x {m['n_embd']}, {shape['rows']} x {m['sequence_len']} tokens"


# -----------------------------------------------------------------------------
# rows


def training_rows(
    device: str, shapes: list[tuple[str, dict, int]], ours: Worker, straight: Worker, seconds: float
) -> list[Row]:
    """Ours against the straightforward form at each (name, shape, steps a turn)."""
    rows = []
    for name, shape, turns in shapes:
        spec = {"case": "step", "turns": turns, **shape}
        row = compared(
            f"training step, {name} ({describe(shape)})",
            "tokens/s",
            turns * tokens(shape),
            partial(run, ours, {**spec, "form": "ours"}),
            "straightforward",
            partial(run, straight, {**spec, "form": "straight"}),
            seconds / len(shapes),
            ">= 1.3x",
        )
        if device == "cuda":
            with torch.device("meta"):
                flops = GPT(GPTConfig(**shape["model"])).flops_per_token() * row.ours
            row = replace(row, note=mfu_note(torch.cuda.get_device_name(), flops))
        rows.append(row)
    return rows


def bf16_row(straight: Worker, seconds: float) -> Row:
    spec = {"case": "step", "form": "straight", **MID}
    return compared(
        f"warning: Muon in fp32 ({describe(MID)})",
        "tokens/s",
        tokens(MID),
        partial(run, straight, spec),
        "in bf16",
        partial(run, straight, {**spec, "bf16": True}),
        seconds,
        note=f"native bf16 on this CPU: {'yes' if has_native_bf16() else 'no'}; ours is fp32 on every CPU",
    )


def compile_row(shape: dict, worker: Worker, seconds: float) -> Row:
    """Whether compiling the model pays on a CPU: the step eager, as it is shipped, against the same step compiled."""
    spec = {"case": "step", "turns": 4, **shape}
    return compared(
        f"eager on a CPU ({describe(shape)})",
        "tokens/s",
        4 * tokens(shape),
        partial(run, worker, {**spec, "form": "ours"}),
        "torch.compile",
        partial(run, worker, {**spec, "form": "compiled"}),
        seconds,
        note="once it has compiled",
    )


def has_native_bf16() -> bool:
    """Whether /proc/cpuinfo lists a bf16 extension (AVX512, AMX, Arm)."""
    try:
        flags = set(open("/proc/cpuinfo").read().split())
    except OSError:
        return False
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def episode_rows(device: str, shapes: list[tuple[str, dict, int]], worker: Worker, seconds: float) -> list[Row]:
    """E episodes together against one after another, at each (name, shape, steps of an episode).

    Together is one batched program, and on a CPU also as `meta_train` has it: a process a core, each with a share of them.
    """
    rows, processes = [], min(EPISODES, os.cpu_count()) if device == "cpu" else 1
    ways = {"as one program": 1, **({f"in {processes} processes": processes} if processes > 1 else {})}
    for name, shape, num_iterations in shapes:
        spec = {"case": "episodes", "episodes": EPISODES, **shape}
        alone = partial(run, worker, {**spec, "together": 1})
        for way, workers in ways.items():
            together = partial(run, worker, {**spec, "together": EPISODES, "workers": workers})
            rows.append(
                compared(
                    f"{EPISODES} episodes {way}, {name} ({describe(shape)})",
                    "episodes/s",
                    EPISODES * STEPS / num_iterations,
                    together,
                    "one after another",
                    alone,
                    seconds / len(shapes) / len(ways),
                    ">= 3x" if device == "cuda" else ">= 2.5x",
                )
            )
    return rows


def sweep_rows(shape: dict, workers: list[Worker], seconds: float) -> list[Row]:
    """8 configurations: one program with a rate per run; two processes side by side; one after another."""
    threads, spec = os.cpu_count(), {"case": "step", "form": "ours", **shape}
    batched = partial(run, workers[0], {**spec, "runs": 8, "threads": threads})
    others = {
        "two processes side by side": partial(run, workers, {**spec, "turns": 4, "threads": max(1, threads // 2)}),
        "one after another": partial(run, workers[0], {**spec, "turns": 8, "threads": threads}),
    }
    return [
        compared(
            f"8 configurations as one program ({describe(shape)})", "steps/s", 8, batched, name, other, seconds / 2
        )
        for name, other in others.items()
    ]


def data_rows(found: dict, fastest: float) -> list[Row]:
    """From `case_data`'s result and the fastest step's tokens/s."""
    note = f"vocabulary of {found['vocab_size']}"
    rows = [Row("token cache, built", "MB/s a core", found["cache_mb_per_s"], target=">= 5", note=note)]
    for T, rate in found["loader"].items():
        rows.append(
            Row(
                f"loader, T = {T}", "tokens/s", rate, "the fastest step above", fastest, rate / fastest, target=">= 20x"
            )
        )
    return rows


def import_row(repeats: int = 5) -> Row:
    """Seconds that `import jel` takes once torch is there."""
    program = "import time, torch; start = time.perf_counter(); import jel; print(time.perf_counter() - start)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return Row("import jel, beyond torch's own", "s", median(seconds), rounds=repeats, target="< 0.2")


def controller_rows(shape: dict, interval: int, worker: Worker, step_seconds: float) -> list[Row]:
    ms = ask(worker, {"case": "controller", "model": shape["model"]})["ms"]
    percent = 100 * ms / 1e3 / (interval * step_seconds)
    return [
        Row("controller, a decision and the param groups", "ms", ms, rounds=1000, target="< 0.1"),
        Row(f"controller, a decision every {interval} steps", "% of a run", percent, target="< 0.05"),
    ]


# -----------------------------------------------------------------------------
# CUDA


def mfu_note(device_name: str, flops: float) -> str:
    """Model-FLOPs utilisation of so many FLOP/s, by the peak of the first known name in `device_name`."""
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
    return (
        f"MFU {flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s"
        if peak
        else f"{flops / 1e12:.0f} TFLOP/s, peak of {device_name} unknown"
    )


def recompilation_row(shape: dict, worker: Worker) -> Row:
    """Raises `UserError` if a decision makes a program compile again."""
    graphs = ask(worker, {"case": "recompilations", "form": "ours", **shape})["graphs"]
    if graphs:
        raise UserError(
            f"{graphs} programs were compiled again during a run with 12 decisions; a hyperparameter enters one as a constant"
        )
    return Row("recompilations, 120 steps with 12 decisions", "programs", graphs, target="0")


# -----------------------------------------------------------------------------
# all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_SECONDS} seconds of timing, not {FULL_SECONDS}, and as many again to start",
    )
    parser.add_argument("--seconds", type=int, default=-1, help="of timing; -1 = by --quick")
    parser.add_argument("--device-type", default="", help="cuda or cpu; default: cuda if present")
    args = parser.parse_args()
    if args.seconds < 1 and args.seconds != -1:
        raise UserError(f"--seconds is {args.seconds}; give 1 or more, or -1")
    seconds = args.seconds if args.seconds > 0 else QUICK_SECONDS if args.quick else FULL_SECONDS
    compute, preset, folder, begin = (
        init_compute(args.device_type),
        resolve_preset(args.preset),
        base_dir() / "report",
        time.perf_counter(),
    )
    device = compute.device.type
    step, episode, train, meta = preset_shapes(preset)
    print0(
        f"{device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: other work on this machine widens the spreads"
    )

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        ours, second, straight = (
            stack.enter_context(Worker(device, keeps_memory=keeps, NANOCHAT_BASE_DIR=scratch))
            for keeps in (True, True, False)
        )
        table: list[Row] = []

        def show(*rows: Row) -> None:
            table.extend(rows)
            print0(*map(line, rows), sep="\n")

        show(*training_rows(device, [(preset, step, 4), ("mid", MID, 1)], ours, straight, 0.25 * seconds))
        fastest = max(row.ours for row in table)
        if device == "cpu":
            show(bf16_row(straight, 0.05 * seconds))
            if not args.quick and shutil.which("g++"):
                show(compile_row(step, ours, 0.05 * seconds))
            elif not args.quick:
                print0("torch.compile on a CPU: not measured, there is no g++")
        else:
            show(recompilation_row(step, ours))
        found = ask(ours, {"case": "data", "files": 300, "vocab_size": step["model"]["vocab_size"], "seconds": 1.0})
        show(
            *episode_rows(
                device,
                [(preset, episode, meta.num_iterations), ("small", SMALL_EPISODE, meta.num_iterations)],
                ours,
                0.25 * seconds,
            )
        )
        one_rank = {**step, "accumulation": 1}
        if device == "cuda":  # 8 runs side by side, and the largest sizes of the curves, must fit its memory
            one_rank["rows"] = max(4, step["rows"] // 8)
        show(*sweep_rows(one_rank, [ours, second], 0.2 * seconds))
        show(*data_rows(found, fastest), import_row())
        show(*controller_rows(step, train.decision_interval, ours, tokens(step) / table[0].ours))
    curves = measure(device, {"case": "step", "form": "ours", **one_rank}, 0.25 * seconds)
    for axis, found in curves.items():
        points = ", ".join(f"{n}: {cost:.4g}" for n, cost in zip(found["sizes"], found["costs"]))
        print0(
            f"{f'growth with {axis}':<52} exponent {found['exponent']:.2f} ({points}) {found['unit']}",
            found["reason"],
            sep="; ",
        )

    folder.mkdir(parents=True, exist_ok=True)
    save_figure(growth_figure(curves, f"{preset} on {device}: a training step, {describe(one_rank)}"), folder, "growth")
    taken = time.perf_counter() - begin
    write_json(
        folder / "bench.json",
        {
            "preset": preset,
            "environment": environment_record(compute),
            "cores": os.cpu_count(),
            "seconds": taken,
            "rows": [asdict(row) for row in table],
            "growth": curves,
        },
    )
    print0(f"done in {format_seconds(taken)}: {folder / 'bench.json'}, {folder / 'growth.png'}")
    return 0


if __name__ == "__main__":
    run_main(main)
