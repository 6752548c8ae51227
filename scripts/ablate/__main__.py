"""What each part of the recipe is worth: learn again with one thing changed, deploy, compare with JEL seed by seed.

    python -m scripts.ablate --preset tiny                    every row; finished ones are skipped
    python -m scripts.ablate --preset tiny paper cma          some rows, by name
    python -m scripts.ablate --list                           the rows
    python -m scripts.ablate --data DIR --policies ~/.cache/nanochat/runs/tiny carried    policies of another text

Needs the runs of `scripts.sweep --what methods` (JEL's own). A row learns one policy a seed, or sweeps settings once,
and deploys what it found, several seeds side by side, in runs/<preset>/ablate/<name>/; the tables are
runs/<preset>/evidence/{ablations,equal_budget,transfer}.json, which scripts.report reads.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from jel.controller import PolicyController
from jel.errors import JelError
from jel.policy import multiplier_table
from jel.schedule import make_schedule, save_schedule
from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.files import read_json, write_json
from nanochat.preemption import REQUEUE_EXIT_CODE
from nanochat.run_log import Stopwatch, format_seconds
from scripts.ablate.rows import NEEDS_POLICIES, TABLES, Row
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.report.costs import exploratory_runs, in_runs, rows_cost, tuning_cost
from scripts.report.evidence import read_evidence
from scripts.report.statistics import compare, total
from scripts.runs import run_folder
from scripts.sweep.__main__ import best_flags, sweep_path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    every = [name for table in TABLES.values() for name in table]
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows; default: all")
    parser.add_argument("--list", action="store_true", help="print the rows, and run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--jobs", type=int, default=-1, help="seeds side by side, a thread each; -1 = one a core")
    parser.add_argument("--data", help="as in base_train; default: the preset's")
    what = "folder of meta-s<seed>/policy, for rows that use JEL's own policies; default: runs/<preset>"
    parser.add_argument("--policies", help=what)
    args = parse_with_preset(parser, "ablate")
    if args.list:
        for table, rows in TABLES.items():
            print0(*(f"{table:>12}  {name:<20}{row.what}" for name, row in rows.items()), sep="\n")
        return 0
    if unknown := set(args.names) - set(every):
        raise UserError(f"there is no row {', '.join(sorted(unknown))}; see python -m scripts.ablate --list")
    folder, chosen = base_dir() / "runs" / args.preset, args.names or [name for name in every if name != NEEDS_POLICIES]
    if NEEDS_POLICIES in chosen and not args.policies:
        raise UserError(f"row {NEEDS_POLICIES} uses policies learned elsewhere; give their folder: --policies")
    if torch.cuda.is_available():
        jobs = 1
    else:
        jobs = args.jobs if args.jobs > 0 else os.cpu_count() or 1
    watch = Stopwatch(len(chosen))
    for done, name in enumerate(chosen):
        table = next(table for table, rows in TABLES.items() if name in rows)
        print0(f"row {done + 1} of {len(chosen)}: {name} ({TABLES[table][name].what}), {len(args.seeds)} seeds")
        if finished := swept(args, table, name, jobs):
            with ThreadPoolExecutor(jobs) as pool:
                finished = all(pool.map(lambda seed, n=name, t=table: run_row(args, folder, t, n, seed), args.seeds))
        if not finished:
            print0("stopped; run the same command again to go on")
            return REQUEUE_EXIT_CODE
        record(args, folder, table, name)
        print0(f"  {done + 1} of {len(chosen)} rows, left {format_seconds(watch.tick(done + 1))}")
    return 0


# -----------------------------------------------------------------------------
# a row with one seed


def swept(args: argparse.Namespace, table: str, name: str, jobs: int) -> bool:
    """Run the sweep of a row that has its own; False if a signal stopped it."""
    row = TABLES[table][name]
    if row.sweep is None:
        return True
    command = ["scripts.sweep", "--preset", args.preset, "--what", row.sweep, "--folder", f"ablate/{name}"]
    command += ["--seeds", *map(str, args.seeds), "--jobs", str(jobs), *(["--data", args.data] if args.data else [])]
    return run([*command, "--", *row.deploy], run_folder(f"{args.preset}/ablate/{name}"))


def run_row(args: argparse.Namespace, folder: Path, table: str, name: str, seed: int) -> bool:
    """Learn and deploy; False if a signal stopped it. Finished parts are skipped."""
    row, tag = TABLES[table][name], f"{args.preset}/ablate/{name}"
    common = ["--preset", args.preset, "--seed", str(seed), "--resume", "auto"]
    common += ["--data", args.data] if args.data else []
    best = best_flags_of(run_folder(tag) if row.sweep else folder, row)
    policy = policy_path(args, folder, row, seed)
    if row.learn is not None:
        meta = f"{tag}/meta-s{seed}"
        command = ["scripts.meta_train", *common, "--episode-workers", "1", *best, *row.learn, "--model-tag", meta]
        if not run(command, run_folder(meta)):
            return False
        policy = run_folder(meta) / "policy"
    if "schedule" in row.control:
        policy = held_mean(policy, run_folder(tag) / f"mean-s{seed}.json")
    deployed = f"{tag}/s{seed}"
    given = ["--policy", str(policy)] if "--controller" in row.control else []
    command = ["scripts.base_train", *common, *row.control, *best, *given, *row.deploy]
    return run([*command, "--eval-every", "0", "--model-tag", deployed], run_folder(deployed))


def policy_path(args: argparse.Namespace, folder: Path, row: Row, seed: int) -> Path:
    """The policy of a row that does not learn: JEL's own of this seed, or that of the row it names."""
    own = Path(args.policies).expanduser().resolve() if args.policies else folder
    return (folder / "ablate" / row.policy_of if row.policy_of else own) / f"meta-s{seed}" / "policy"


def best_flags_of(folder: Path, row: Row) -> list[str]:
    """The flags of the method of Table 1 that the row carries."""
    if row.best_of is None:
        return []
    return ["--hparams", "uniform"] if row.best_of == "suboptimal" else best_flags(folder, row.best_of)


def run(command: list[str], folder: Path) -> bool:
    """Run a module in a process of one thread. Raises `UserError` naming its output if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(
            [sys.executable, "-m", *command], stdout=output, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code not in (0, REQUEUE_EXIT_CODE):
        raise UserError(f"{folder} failed with exit status {code}; all it printed is in {folder / 'output.txt'}")
    return code == 0


def held_mean(policy_path: Path, path: Path) -> Path:
    """A schedule of one decision: the geometric mean over progress of a policy's multipliers."""
    controller = PolicyController(policy_path)
    rows = [row["multipliers"] for row in multiplier_table(controller.policy, [i / 50 for i in range(50)])]
    mean = {
        group: {key: float(torch.tensor([r[group][key] for r in rows]).log().mean().exp()) for key in rows[0][group]}
        for group in rows[0]
    }
    decisions, source = [{"progress": 0.0, "multipliers": mean}], f"mean of {policy_path}"
    save_schedule(make_schedule(decisions, source, decay_carry=controller.decay_carry), path)
    return path


# -----------------------------------------------------------------------------
# the tables


def record(args: argparse.Namespace, folder: Path, table: str, name: str) -> None:
    """Write the row into its table, with JEL's verdict against it by the paired difference."""
    evidence, row = read_evidence(base_dir() / "runs", args.preset), TABLES[table][name]
    results, price = {}, []
    for seed in args.seeds:
        tag = run_folder(f"{args.preset}/ablate/{name}")
        results[seed] = read_json(tag / f"s{seed}" / "result.json", "result")
        if row.learn is not None:
            price.append(read_json(tag / f"meta-s{seed}" / "result.json", "result")["flops"])
        elif row.best_of is None and (path := policy_path(args, folder, row, seed).parent / "result.json").exists():
            price.append(read_json(path, "result")["flops"])  # what its policy cost
    bpb = {seed: result["test_bpb"] for seed, result in results.items()}
    verdict, difference, interval = "-", None, None
    if row.against is not None:
        others = evidence.results(row.against, "test_bpb")
        if any(row.against in rows for rows in TABLES.values()):
            other = run_folder(f"{args.preset}/ablate/{row.against}")
            paths = {seed: other / f"s{seed}" / "result.json" for seed in args.seeds}
            others = {seed: read_json(path, "result")["test_bpb"] for seed, path in paths.items() if path.exists()}
        c = compare(bpb, others) if row.against == "hand_tuned" else compare(others, bpb)
        spread = "" if c.interval is None else " ({:+.4f} [{:+.4f}, {:+.4f}])".format(c.difference, *c.interval)
        verdict = f"JEL is {c.verdict}{spread}" if c.verdict in ("better", "worse") else c.verdict + spread
        if row.against == "jel":
            difference, interval = c.difference, c.interval
    if price:
        runs = in_runs(evidence, sum(price) / len(price))
    elif row.sweep is not None:
        sweep = read_json(sweep_path(run_folder(f"{args.preset}/ablate/{name}"), row.sweep), "sweep")
        runs = total([rows_cost(evidence, sweep["rows"]).runs, exploratory_runs(evidence, row.best_of)])
    else:
        runs = None if row.best_of is None else tuning_cost(evidence, row.best_of)
    found = {
        "name": row.what,
        "test_bpb": [bpb[seed] for seed in args.seeds],
        "run_equivalents": runs,
        "verdict": verdict,
        "difference": difference,  # JEL's minus the row's
        "interval": interval,
    }
    path = folder / "evidence" / f"{table}.json"
    rows = [r for r in (read_json(path) if path.exists() else []) if r["name"] != row.what]
    order = {r.what: i for i, r in enumerate(TABLES[table].values())}  # rows of former versions come last
    write_json(path, sorted([*rows, found], key=lambda r: order.get(r["name"], len(order))))
    print0(f"  {row.what}: {', '.join(f'{v:.4f}' for v in found['test_bpb'])}; {verdict}")


if __name__ == "__main__":
    run_main(main, JelError)
