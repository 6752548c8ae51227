"""Run many base_train runs, several side by side. Started again it skips finished runs and resumes the others.

    python -m scripts.sweep --what schedule-free                    the 8 settings of the paper's Table 3
    python -m scripts.sweep --what schedule-free-fair               8 more around the best of them
    python -m scripts.sweep --preset tiny --what hand-tuned         open tuning of the upper bound, 12 settings
    python -m scripts.sweep --what best-constant                    constant multipliers, as many as meta-training costs
    python -m scripts.sweep --what methods --seeds 42 43 44 45 46   the methods of Table 1, each with every seed
    python -m scripts.sweep --what hand-tuned --folder deeper -- --depth 4   any flags of base_train for every run

Each run has its folder $NANOCHAT_BASE_DIR/runs/<preset>/<name>/, with what it printed in output.txt. A sweep over
settings uses the first seed and writes runs/<preset>/sweep_<what>.json: {"rows": [...], "best": index, "runs": 12}.
With --folder, both lie in runs/<preset>/<folder>.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from jel.errors import JelError
from jel.registry import load_controller
from nanochat.checkpoint import untrusted
from nanochat.common import UserError, print0, run_main
from nanochat.dataset import resolve_data
from nanochat.files import read_json, write_json
from nanochat.preemption import REQUEUE_EXIT_CODE
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts import base_train
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.runs import run_folder
from scripts.sweep.progress import Job, describe
from scripts.sweep.runs import Devices, alone, row_of, run_jobs
from scripts.sweep.settings import (
    FEWEST_CONSTANTS,
    PAPER_STEPS,
    SWEEPS,
    WD_MULTIPLIERS,
    Plan,
    lr_multipliers,
    run_price,
)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_preset_flag(parser)
    flag("--what", choices=[*(what for sweeps in SWEEPS.values() for what in sweeps), "methods"], required=True)
    flag("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the methods; settings use the first")
    flag("--settings", type=int, help="settings of a sweep; default: all; best-constant: as meta-training costs")
    flag("--jobs", type=int, default=-1, help="runs side by side; -1 = as many as the cores or GPUs have room for")
    flag("--nproc", type=int, default=-1, help="processes of a run; -1 = 1, or the most GPUs its batch divides by")
    flag("--policy", help="methods: jel's policy for every seed, or `shipped`; default: runs/<preset>/meta-s<seed>'s")
    flag("--data", help="as in base_train; default: the preset's")
    flag("--num-iterations", type=int, default=-1, help="steps of every run; -1 = the preset's")
    flag("--folder", default="", help="inside runs/<preset>, for runs with other flags; default: runs/<preset> itself")
    flag("run_flags", nargs="*", metavar="-- FLAG", help="of base_train, for every run")
    return parser


def main() -> int:
    args = parse_with_preset(flags(), "sweep")
    folder = run_folder(f"{args.preset}/{args.folder}")
    if args.settings is not None and args.settings < 1:
        raise UserError(f"--settings is {args.settings}; it must be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))} names a seed twice; give each once")
    if args.what == "hand-tuned" and args.preset == "paper":
        raise UserError("--what hand-tuned is for tiny and smoke; at paper the defaults are the paper's upper bound")
    if args.policy and args.what != "methods":
        raise UserError(f"--policy is for --what methods; --what {args.what} runs no controller")
    common = ["--data", args.data] if args.data else []
    common += ["--num-iterations", str(args.num_iterations)] if args.num_iterations != -1 else []
    common += args.run_flags
    every_run = parse_with_preset(base_train.flags(), "base_train", ["--preset", args.preset, *common])
    steps = PAPER_STEPS if every_run.num_iterations == -1 else every_run.num_iterations  # only paper derives its length
    plan = Plan(args.preset, args.seeds, steps, common, args.folder)

    # -------------------------------------------------------------------------
    # what is to be run

    later = 0  # runs that are planned once the first ones are done
    if args.what == "schedule-free":
        print0(f"warm-ups: Table 3's are of {PAPER_STEPS} steps; scaled by {steps}/{PAPER_STEPS} and rounded")
        jobs = plan.schedule_free()[: args.settings]
    elif args.what == "schedule-free-fair":
        best = best_row(folder, "schedule-free")
        with untrusted(sweep_path(folder, "schedule-free")):
            jobs = plan.schedule_free_fair(best)[: args.settings]
    elif args.what == "hand-tuned":
        jobs = plan.hand_tuned()[: args.settings]
    elif args.what == "best-constant":
        runs = args.settings or meta_training_runs(folder, args.seeds[0])
        later = min(len(WD_MULTIPLIERS), runs - 1)
        multipliers = lr_multipliers(runs - later)
        base = every_run.base_lr, every_run.base_wd
        jobs = [plan.constant(i, lr, 1.0, *base) for i, lr in enumerate(multipliers)]
    else:
        best = {method: best_flags(folder, method) for method in ("schedule_free", "best_constant")}
        tuned = (folder / "sweep_hand_tuned.json").exists()
        best["hand_tuned"] = best_flags(folder, "hand_tuned") if tuned else []
        for method, words in best.items():
            print0(f"{method}: {' '.join(words) or 'the defaults (there is no hand-tuned sweep)'}")
        jobs = plan.methods(find_policies(args.policy, folder, args.seeds), best)

    # -------------------------------------------------------------------------
    # run them

    with alone(folder / f".sweep_{args.what}.lock") as lock:
        rows = {job.tag: row for job in jobs if (row := row_of(job))}
        if len(rows) < len(jobs):
            # Here rather than in the first runs, so that its progress and its errors are seen.
            TokenCache.build(resolve_data(every_run.data), Tokenizer.load(tokenizer_folder(every_run.tokenizer)))
        devices = find_devices(args, every_run, max(len(jobs), later))
        each = f"{devices.nproc} of {len(devices.gpus)} GPUs" if devices.gpus else f"{devices.nproc} x 1 thread"
        many = f"{len(jobs)} runs, {len(rows)} done already" + f", {later} more after them" * (later > 0)
        print0(f"{args.what}: {many}; {devices.jobs} side by side, {each} each")
        done = run_jobs(jobs, rows, steps, devices, lock)
        if done and later and (winner := best_of(jobs, rows)) is not None:
            lr, n = jobs[winner].setting["lr_multiplier"], len(jobs)
            jobs += [plan.constant(n + i, lr, wd, *base) for i, wd in enumerate(WD_MULTIPLIERS[:later])]
            rows |= {job.tag: row for job in jobs[n:] if (row := row_of(job))}
            done = run_jobs(jobs, rows, steps, devices, lock)
        if not done:
            print0(f"stopped with {len(rows)} of {len(jobs)} runs done; run the same command again to go on")
            return REQUEUE_EXIT_CODE

        if args.what != "methods":
            winner, path = best_of(jobs, rows), sweep_path(folder, args.what)
            write_json(path, {"rows": [rows[job.tag] for job in jobs], "best": winner, "runs": len(jobs)})
            best = "none, every setting diverged" if winner is None else describe(jobs[winner], rows[jobs[winner].tag])
            print0(f"best: {best}; written to {path}")
    return 0


# -----------------------------------------------------------------------------
# what earlier stages found


def sweep_path(folder: Path, what: str) -> Path:
    return folder / f"sweep_{what.replace('-', '_')}.json"


def best_of(jobs: list[Job], rows: dict[str, dict]) -> int | None:
    """The index of the job with the least validation loss; None if all of them diverged."""
    finished = [i for i, job in enumerate(jobs) if rows[job.tag]["val_bpb"] is not None]
    return min(finished, key=lambda i: rows[jobs[i].tag]["val_bpb"], default=None)


def best_row(folder: Path, what: str) -> dict:
    """The row that won a sweep. Raises `UserError` if there is none, or the file is not a sweep's."""
    path = sweep_path(folder, what)
    preset, _, inside = folder.as_posix().rpartition("/runs/")[2].partition("/")
    again = f"python -m scripts.sweep --preset {preset} --what {what}" + f" --folder {inside}" * bool(inside)
    if not path.exists():
        raise UserError(f"{path} does not exist; first run: {again}")
    sweep = read_json(path, "sweep")
    try:
        if sweep["best"] is None:
            raise UserError(
                f"{path} has no best setting: all of them diverged; change them in scripts/sweep/settings.py"
            )
        row = sweep["rows"][sweep["best"]]
        return {**row, "flags": [str(word) for word in row["flags"]], "val_bpb": float(row["val_bpb"])}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is not what a sweep writes; delete it and run: {again}") from None


def best_flags(folder: Path, method: str) -> list[str]:
    """The flags that won the method's sweeps: of `schedule_free` the better of the two winners.

    Raises `UserError` if there is no winner. If the further sweep was not run, one line says so.
    """
    first, *further = SWEEPS[method]
    winners = [best_row(folder, first)]
    for what in further:
        if sweep_path(folder, what).exists():
            winners.append(best_row(folder, what))
        else:
            print0(f"{method}: best of --what {first} only, --what {what} was not run")
    return min(winners, key=lambda row: row["val_bpb"])["flags"]


def meta_training_runs(folder: Path, seed: int) -> int:
    """What the first seed's meta-training cost, in runs of a setting by FLOPs; at least 4."""
    path, sweep = folder / f"meta-s{seed}" / "result.json", sweep_path(folder, "schedule-free")
    for needed in (path, sweep):
        if not needed.exists():
            raise UserError(f"{needed} does not exist, so the price of meta-training is unknown; give --settings")
    try:
        spent, one = float(read_json(path, "result")["flops"]), run_price(read_json(sweep, "sweep")["rows"])
        runs = round(spent / one)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise UserError(f"{path} or {sweep} has no FLOPs; run its stage again, or give --settings") from None
    print0(f"meta-training with seed {seed} cost {spent:.3g} FLOPs = {spent / one:.2f} runs of {one:.3g}")
    if runs < FEWEST_CONSTANTS:
        print0(f"the search needs at least {FEWEST_CONSTANTS} runs, and gets them")
    return max(runs, FEWEST_CONSTANTS)


def find_policies(given: str | None, folder: Path, seeds: list[int]) -> dict[int, str | None]:
    """The controller's policy for each seed, checked before anything runs; None is the shipped one.

    Raises `UserError` if some of the seeds have a policy of their own and others have none.
    """
    trained = {seed: folder / f"meta-s{seed}" / "policy.safetensors" for seed in seeds}
    missing = [seed for seed, path in trained.items() if not path.exists()]
    if given:
        policies = dict.fromkeys(seeds, None if given == "shipped" else os.path.abspath(given))
        print0(f"jel: {given} policy for every seed")
    elif len(missing) == len(seeds):
        policies = dict.fromkeys(seeds)
        print0(f"jel: the policy shipped with the package for every seed ({trained[seeds[0]]} does not exist)")
    elif missing:
        one = f"python -m scripts.meta_train --preset {folder.name} --seed {missing[0]}"
        raise UserError(
            f"no policy for seed {missing[0]}; first run: {one} --model-tag {folder.name}/meta-s{missing[0]}"
        )
    else:
        policies = {seed: os.path.abspath(path) for seed, path in trained.items()}
        print0(f"jel: policy of the same seed, {folder}/meta-s<seed>/policy.safetensors")
    for policy in set(policies.values()):
        load_controller("jel", policy)
    return policies


# -----------------------------------------------------------------------------
# the machine


def find_devices(args: argparse.Namespace, every_run: argparse.Namespace, most: int) -> Devices:
    """How many runs side by side, and on what. Raises `UserError` for what the machine does not have."""
    gpus = []
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    for name in ("jobs", "nproc"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1, or -1 to choose it here")
    if gpus and args.nproc > len(gpus):
        raise UserError(f"--nproc {args.nproc}, but there are {len(gpus)} GPUs; give at most that many")
    micro_batch = max(1, every_run.device_batch_size) * every_run.max_seq_len  # -1: any number of rows divides
    fitting = [n for n in range(1, len(gpus) + 1) if every_run.total_batch_size % (micro_batch * n) == 0]
    nproc = args.nproc if args.nproc > 0 else max(fitting, default=1)
    room = max(1, (len(gpus) or os.cpu_count()) // nproc)
    return Devices(min(args.jobs if args.jobs > 0 else room, most), nproc, gpus)


if __name__ == "__main__":
    run_main(main, JelError)
