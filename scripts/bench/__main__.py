"""How fast this is: each rate beside what it is compared with, both timed in turn (A B A B ...) on this machine.

    python -m scripts.bench --quick          a minute of timing, for a first look
    python -m scripts.bench --seconds 1200   narrower spreads; without --quick also what torch.compile gives on a CPU
    python -m scripts.bench --preset paper   the paper's shapes, on a GPU

Writes bench.json, growth.png and growth.svg to $NANOCHAT_BASE_DIR/report/. The rows are the only speeds to quote.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from nanochat.common import UserError, base_dir, init_compute, print0, run_main
from nanochat.files import write_json
from nanochat.run_log import environment_record, format_seconds
from scripts.bench import growth
from scripts.bench.first_look import looks
from scripts.bench.rows import (
    bf16_row,
    compiled_ours_row,
    compiled_straight_rows,
    controller_rows,
    data_rows,
    episode_rows,
    import_row,
    recompilation_row,
    sweep_rows,
    training_rows,
)
from scripts.bench.shapes import MID, SMALL_EPISODE, describe, one_micro_batch, preset_shapes, tokens
from scripts.bench.table import Row
from scripts.bench.worker import Worker, result_of
from scripts.presets import add_preset_flag, resolve_preset

QUICK_SECONDS, FULL_SECONDS = 60, 400


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds of timing, not {FULL_SECONDS}")
    what = "the rows to have first on a GPU, each written as it ends; there, --quick is this"
    parser.add_argument("--first-look", action="store_true", help=what)
    parser.add_argument("--seconds", type=int, default=-1, help="of timing, start-up not counted; -1 = by --quick")
    parser.add_argument("--device-type", default="", help="cuda or cpu; default: cuda if present")
    args = parser.parse_args()
    if args.seconds < 1 and args.seconds != -1:
        raise UserError(f"--seconds is {args.seconds}; give 1 or more, or -1")
    return args


def main() -> int:
    args, begin = parse(), time.perf_counter()
    compute, preset, folder = init_compute(args.device_type), resolve_preset(args.preset), base_dir() / "report"
    device, cuda = compute.device.type, compute.is_cuda
    seconds = args.seconds if args.seconds > 0 else QUICK_SECONDS if args.quick else FULL_SECONDS
    step, episode, train, meta = preset_shapes(preset)
    table: list[Row] = []

    def write(**rest) -> None:
        record = {"preset": preset, "environment": environment_record(compute), "cores": os.cpu_count()}
        record |= {"seconds": time.perf_counter() - begin, "rows": [asdict(row) for row in table]}
        write_json(folder / "bench.json", record | rest)

    def attempt(name: str, measure: Callable[[], list[Row]]) -> None:
        """Print and write the rows of one question; one that cannot be answered here is named."""
        try:
            rows = measure()
        except UserError as e:
            return print0(f"{name}: not measured ({e})")
        table.extend(rows)
        print0(*rows, sep="\n")
        write()

    print0(f"{device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (best measured on an idle machine)")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if args.first_look or cuda and args.quick:
            worker = stack.enter_context(Worker(device, NANOCHAT_BASE_DIR=scratch))
            shapes = step, episode, meta.num_iterations, train.decision_interval
            for look in looks(*shapes, worker, cuda, seconds):
                attempt(*look)
            print0(f"done in {format_seconds(time.perf_counter() - begin)}: {folder / 'bench.json'}")
            return 0
        ours, second, straight = (
            stack.enter_context(Worker(device, keeps_memory, NANOCHAT_BASE_DIR=scratch))
            for keeps_memory in (True, True, False)
        )
        shapes = [(preset, step, 4), ("mid", MID, 1)]
        attempt("training step", lambda: training_rows(device, shapes, ours, straight, 0.2 * seconds))
        step_seconds = tokens(step) / table[0].ours if table else math.nan
        fastest = max([row.ours for row in table], default=math.nan)
        if cuda or not args.quick and shutil.which("g++"):
            attempt("compiled", lambda: compiled_straight_rows(shapes, ours, straight, 0.1 * seconds))
        if cuda:
            attempt("recompilations", lambda: [recompilation_row(step, ours)])
        else:
            attempt("bf16", lambda: [bf16_row(straight, 0.05 * seconds)])
            if not args.quick and shutil.which("g++"):
                attempt("compiled on a CPU", lambda: [compiled_ours_row(step, ours, 0.05 * seconds)])
            else:
                print0(f"torch.compile on a CPU: not measured ({'--quick' if args.quick else 'there is no g++'})")
        episodes = [(preset, episode, meta.num_iterations), ("small", SMALL_EPISODE, meta.num_iterations)]
        attempt("episodes", lambda: episode_rows(device, episodes, ours, 0.2 * seconds))
        micro, several = one_micro_batch(step, device), [ours, second]
        attempt("configurations", lambda: sweep_rows(micro, several, 0.15 * seconds))
        data = {"case": "data", "files": 300, "vocab_size": step["model"]["vocab_size"], "seconds": 1.0}
        attempt("data", lambda: data_rows(result_of(ours, data), fastest))
        attempt("import", lambda: [import_row()])
        attempt("controller", lambda: controller_rows(step, train.decision_interval, ours, step_seconds))

    curves = growth.measure(device, {"case": "step", "form": "ours", **micro}, 0.25 * seconds)
    print0(*(growth.describe(axis, curve) for axis, curve in curves.items()), sep="\n")
    write(growth=curves)
    if importlib.util.find_spec("matplotlib"):
        from scripts.report.figures import save_figure

        title = f"{preset} on {device}: a training step, {describe(micro)}"
        save_figure(growth.growth_figure(curves, title), folder, "growth")
    print0(f"done in {format_seconds(time.perf_counter() - begin)}: {folder / 'bench.json'}")
    return 0


if __name__ == "__main__":
    run_main(main)
