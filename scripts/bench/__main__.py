"""How fast this is: each rate beside what it is compared with, both timed in turn (A B A B ...) on this machine.

    python -m scripts.bench --quick          a minute of timing, for a first look
    python -m scripts.bench --seconds 1200   narrower spreads; without --quick also what torch.compile gives on a CPU
    python -m scripts.bench --preset paper   the paper's shapes, on a GPU

Writes bench.json, growth.png and growth.svg to $NANOCHAT_BASE_DIR/report/. The rows are the only speeds to quote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict

from nanochat.common import UserError, base_dir, init_compute, print0, run_main
from nanochat.files import write_json
from nanochat.run_log import environment_record, format_seconds
from scripts.bench import growth
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
from scripts.report.figures import save_figure

QUICK_SECONDS, FULL_SECONDS = 60, 400


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds of timing, not {FULL_SECONDS}")
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

    def show(*rows: Row) -> None:
        table.extend(rows)
        print0(*rows, sep="\n")

    print0(f"{device}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (best measured on an idle machine)")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        ours, second, straight = (
            stack.enter_context(Worker(device, keeps_memory, NANOCHAT_BASE_DIR=scratch))
            for keeps_memory in (True, True, False)
        )
        shapes = [(preset, step, 4), ("mid", MID, 1)]
        show(*training_rows(device, shapes, ours, straight, 0.2 * seconds))
        step_seconds, fastest = tokens(step) / table[0].ours, max(row.ours for row in table)
        if cuda or not args.quick and shutil.which("g++"):
            show(*compiled_straight_rows(shapes, ours, straight, 0.1 * seconds))
        if cuda:
            show(recompilation_row(step, ours))
        else:
            show(bf16_row(straight, 0.05 * seconds))
            if not args.quick and shutil.which("g++"):
                show(compiled_ours_row(step, ours, 0.05 * seconds))
            else:
                print0(f"torch.compile on a CPU: not measured ({'--quick' if args.quick else 'there is no g++'})")

        vocab_size = step["model"]["vocab_size"]
        found = result_of(ours, {"case": "data", "files": 300, "vocab_size": vocab_size, "seconds": 1.0})
        episodes = [(preset, episode, meta.num_iterations), ("small", SMALL_EPISODE, meta.num_iterations)]
        show(*episode_rows(device, episodes, ours, 0.2 * seconds))
        show(*sweep_rows(one_micro_batch(step, device), [ours, second], 0.15 * seconds))
        show(*data_rows(found, fastest), import_row())
        show(*controller_rows(step, train.decision_interval, ours, step_seconds))

    grown = one_micro_batch(step, device)
    curves = growth.measure(device, {"case": "step", "form": "ours", **grown}, 0.25 * seconds)
    print0(*(growth.describe(axis, curve) for axis, curve in curves.items()), sep="\n")
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{preset} on {device}: a training step, {describe(grown)}"
    save_figure(growth.growth_figure(curves, title), folder, "growth")
    taken = time.perf_counter() - begin
    record = {"preset": preset, "environment": environment_record(compute), "cores": os.cpu_count(), "seconds": taken}
    write_json(folder / "bench.json", {**record, "rows": [asdict(row) for row in table], "growth": curves})
    print0(f"done in {format_seconds(taken)}: {folder / 'bench.json'}, {folder / 'growth.png'}")
    return 0


if __name__ == "__main__":
    run_main(main)
