"""Run many base_train runs, several side by side. Started again it skips what is done and resumes what is not.

    python -m scripts.sweep --what schedule-free                    the 8 settings of the paper's Table 3
    python -m scripts.sweep --preset tiny --what hand-tuned         open tuning of the upper bound, 8 settings too
    python -m scripts.sweep --what methods --seeds 42 43 44         the 4 methods of Table 1, each with every seed

Each run has its folder $NANOCHAT_BASE_DIR/runs/<preset>/<name>/, with what it printed in output.txt. A sweep over
settings uses the first seed and writes runs/<preset>/sweep_<what>.json: {"rows": [...], "best": index, "runs": 8}.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from jel.controller import load_controller
from jel.errors import JelError
from nanochat.common import UserError, base_dir, print0, run_main
from nanochat.dataset import resolve_data
from nanochat.files import read_json, write_json
from nanochat.preemption import REQUEUE_EXIT_CODE
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts import base_train
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.sweep.runs import Job, Places, alone, describe, row_of, run_jobs

# -----------------------------------------------------------------------------
# settings

# Table 3 of the paper, in its order: schedule-free rate, weight decay, warm-up in steps of a run of PAPER_STEPS.
PAPER_STEPS = 561
SCHEDULE_FREE = [
    (0.5, 0.00, 0),
    (0.5, 0.01, 0),
    (1.0, 0.00, 0),
    (1.0, 0.01, 0),
    (2.0, 0.00, 0),
    (2.0, 0.01, 0),
    (1.0, 0.01, 100),
    (1.0, 0.01, 300),
]

# The upper bound at tiny: these rates x a scale, and the weight decay (base_train multiplies it by (12 / depth)^2).
# They were placed by 37 exploratory runs (seed 42), which belong to this baseline's budget beside the 8: 23 with 4 layers
# of width 64, 14 with tiny's 2; on longer documents than today's, so these bpb compare with one another only:
#   matrix  embedding  unembedding  scalar  decay  4 layers  2 layers
#     0.02        0.3        0.004     0.5    0.2     2.065            the paper's; x 0.25 to x 4: no better
#     0.04        0.6        0.008     1.0   0.02     2.063
#     0.05       0.05         0.05    0.05            2.030            --hparams uniform, decay 0.01 for all
#     0.04       0.03        0.016     0.1    0.2     2.089
#     0.04       0.03        0.016     0.1   0.02     2.025
#     0.04       0.03        0.016     0.1      0     2.018
#     0.06       0.06        0.016     0.1  0.005     2.010     2.095  x 0.5, 0.7, 1.4, 2: 2.111, 2.093, 2.114, 2.151
#     0.06       0.06        0.016     0.1      0               2.085  x 0.7, 1.4: 2.087, 2.103
#     0.06       0.06        0.008     0.1      0               2.070
#     0.06       0.06        0.004     0.1      0               2.069
#     0.06       0.15        0.008     0.1      0               2.066
HAND_TUNED_RATES = {"--matrix-lr": 0.06, "--embedding-lr": 0.1, "--unembedding-lr": 0.008, "--scalar-lr": 0.1}
HAND_TUNED = [
    (0.7, 0.0),
    (0.7, 0.005),
    (1.0, 0.0),
    (1.0, 0.005),  # lr scale, weight decay
    (1.4, 0.0),
    (1.4, 0.005),
    (2.0, 0.0),
    (2.0, 0.005),
]

# A setting is judged by its end (only the methods' curves are drawn), and as it is: a run mended by lower rates
# would be another setting's, so one that diverges is recorded as diverged.
AS_IT_IS = ["--eval-every", "0", "--sample-tokens", "0", "--max-recoveries", "0"]


def plan(
    what: str,
    preset: str,
    seeds: list[int],
    steps: int,
    policy: str | None = None,
    best: dict[str, list[str]] | None = None,
    common: Sequence[str] = (),
) -> list[Job]:
    """The runs of a sweep: `steps` long, with the flags `common`. `what` is schedule-free, hand-tuned or methods.

    For methods, `policy` is the controller's (None: the shipped one), and `best` holds the flags that won the sweeps of
    `hand_tuned` and `schedule_free`.
    """

    def job(name: str, seed: int, setting: dict, flags: list, *others: str) -> Job:
        common_flags = ["--preset", preset, "--seed", str(seed), *common, *others]
        return Job(f"{preset}/{name}", setting, [str(word) for word in flags], common_flags)

    if what == "schedule-free":
        rows = [{"lr": lr, "wd": wd, "warmup": round(warm * steps / PAPER_STEPS)} for lr, wd, warm in SCHEDULE_FREE]
        sf = lambda row: [word for key, value in row.items() for word in (f"--sf-{key}", value)]
        return [
            job(f"sf-{i}", seeds[0], row, ["--optimizer", "schedule-free", *sf(row)], *AS_IT_IS)
            for i, row in enumerate(rows)
        ]
    if what == "hand-tuned":
        rates = lambda scale: [word for flag, rate in HAND_TUNED_RATES.items() for word in (flag, f"{rate * scale:g}")]
        return [
            job(
                f"ht-{i}",
                seeds[0],
                {"lr_scale": scale, "weight_decay": wd},
                [*rates(scale), "--weight-decay", wd],
                *AS_IT_IS,
            )
            for i, (scale, wd) in enumerate(HAND_TUNED)
        ]
    methods = {
        "hand_tuned": best["hand_tuned"],
        "jel": ["--hparams", "uniform", "--controller", "jel", *(["--policy", policy] if policy else [])],
        "schedule_free": best["schedule_free"],
        "suboptimal": ["--hparams", "uniform"],
    }
    return [job(f"{name}-s{seed}", seed, {}, flags) for seed in seeds for name, flags in methods.items()]


# -----------------------------------------------------------------------------
# flags


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_preset_flag(parser)
    flag("--what", choices=["schedule-free", "hand-tuned", "methods"], required=True)
    flag("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the methods; settings use the first")
    flag("--settings", type=int, default=8, help="settings of a sweep that are run, from the first on")
    flag("--jobs", type=int, default=-1, help="runs side by side; -1 = as many as the cores or GPUs have room for")
    flag("--nproc", type=int, default=-1, help="processes of a run; -1 = 1, or the most GPUs its batch divides by")
    flag("--policy", help="methods: jel's policy; default: meta_train's in runs/<preset>/meta, else the shipped one")
    flag("--data", help="as in base_train; default: the preset's")
    return parser


def main() -> int:
    args = parse_with_preset(flags(), "sweep")
    folder = base_dir() / "runs" / args.preset
    if args.settings < 1:
        raise UserError(f"--settings is {args.settings}; it must be at least 1")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))} names a seed twice; give each once")
    if args.what == "hand-tuned" and args.preset == "paper":
        raise UserError("--what hand-tuned is for tiny and smoke; at paper the defaults are the paper's upper bound")
    if args.policy and args.what != "methods":
        raise UserError(f"--policy is for --what methods; --what {args.what} runs no controller")

    # -------------------------------------------------------------------------
    # what is to be run

    common = ["--data", args.data] if args.data else []
    every_run = parse_with_preset(base_train.flags(), "base_train", ["--preset", args.preset, *common])
    steps = PAPER_STEPS if every_run.num_iterations == -1 else every_run.num_iterations  # only paper derives its length
    policy, best = None, None
    if args.what == "schedule-free":
        print0(f"warm-ups: Table 3's are of {PAPER_STEPS} steps; scaled by {steps}/{PAPER_STEPS} and rounded")
    elif args.what == "methods":
        best = {"schedule_free": best_flags(folder, "schedule_free"), "hand_tuned": []}
        if (folder / "sweep_hand_tuned.json").exists():
            best["hand_tuned"] = best_flags(folder, "hand_tuned")
        print0(f"hand_tuned: {' '.join(best['hand_tuned']) or 'the defaults (there is no hand-tuned sweep)'}")
        print0(f"schedule_free: {' '.join(best['schedule_free'])}")
        policy = find_policy(args.policy, folder)
    jobs = plan(args.what, args.preset, args.seeds, steps, policy, best, common)
    if args.what != "methods":
        jobs = jobs[: args.settings]

    # -------------------------------------------------------------------------
    # run them

    with alone(folder / f".sweep_{args.what}.lock") as lock:
        rows = {job.tag: row for job in jobs if (row := row_of(job))}
        if len(rows) < len(jobs):
            # Here rather than in the first runs, so that its progress and its errors are seen.
            TokenCache.build(resolve_data(every_run.data), Tokenizer.load(tokenizer_folder(every_run.tokenizer)))
        places = find_places(args, every_run, len(jobs))
        each = f"{places.nproc} of {len(places.gpus)} GPUs" if places.gpus else f"{places.nproc} x 1 thread"
        print0(f"{args.what}: {len(jobs)} runs, {len(rows)} done already; {places.jobs} side by side, {each} each")
        if not run_jobs(jobs, rows, steps, places, lock):
            print0(f"stopped with {len(rows)} of {len(jobs)} runs done; run the same command again to go on")
            return REQUEUE_EXIT_CODE

        if args.what != "methods":
            in_order = [rows[job.tag] for job in jobs]
            scored = [i for i, row in enumerate(in_order) if row["val_bpb"] is not None]
            winner = min(scored, key=lambda i: in_order[i]["val_bpb"], default=None)
            path = folder / f"sweep_{args.what.replace('-', '_')}.json"
            write_json(path, {"rows": in_order, "best": winner, "runs": len(jobs)})
            told = "none, every setting diverged" if winner is None else describe(jobs[winner], in_order[winner])
            print0(f"best: {told}; written to {path}")
    return 0


def best_flags(folder: Path, method: str) -> list[str]:
    """The flags that won the method's sweep. Raises `UserError` if there is no winner."""
    path = folder / f"sweep_{method}.json"
    again = f"python -m scripts.sweep --preset {folder.name} --what {method.replace('_', '-')}"
    if not path.exists():
        raise UserError(f"{path} does not exist; first run: {again}")
    try:
        sweep = read_json(path, "sweep")
        if sweep["best"] is None:
            raise UserError(f"{path} has no best setting, because all of them diverged; edit those in scripts/sweep.py")
        return [str(word) for word in sweep["rows"][sweep["best"]]["flags"]]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{path} is not what a sweep writes; delete it and run: {again}") from None


def find_policy(given: str | None, folder: Path) -> str | None:
    """The controller's policy, checked before anything runs; None for the shipped one."""
    trained = folder / "meta" / "policy.safetensors"
    policy = given or (str(trained) if trained.exists() else None)
    policy = policy and os.path.abspath(policy)
    print0(f"jel: policy {policy or f'shipped with the package ({trained} does not exist)'}")
    load_controller("jel", policy)
    return policy


def find_places(args: argparse.Namespace, every_run: argparse.Namespace, most: int) -> Places:
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
    micro_batch = every_run.device_batch_size * every_run.max_seq_len
    fitting = [n for n in range(1, len(gpus) + 1) if every_run.total_batch_size % (micro_batch * n) == 0]
    nproc = args.nproc if args.nproc > 0 else max(fitting, default=1)
    room = max(1, (len(gpus) or os.cpu_count()) // nproc)
    return Places(min(args.jobs if args.jobs > 0 else room, most), nproc, gpus)


if __name__ == "__main__":
    run_main(main, JelError)
