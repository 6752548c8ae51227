"""LHOPT in charge of nanochat: all groups of the uniform base under live control, beside hand-tuned and fixed rates.

    python -m scripts.lhopt.pretrain --preset tiny                                  the shipped policy, 5 seeds
    python -m scripts.lhopt.pretrain --preset tiny --policies lhopt/tiny-s42 lhopt/tiny-s43
    python -m scripts.lhopt.pretrain --preset small --seeds 42 43

No policy was trained on this model, its optimizer or its text. A run is scripts.base_train's, from a learning rate of
1e-3 and a weight decay of 1e-2 for every group; the policy watches the training loss and the optimizer, and decides
20 times. The loss on the fixed probe batches, which no gradient sees, is its validation loss (but there is no guard);
in the other runs it is shown none. Runs lie in runs/<preset>/lhopt/, and finished ones are not repeated. The other
lines of the table are the runs of `scripts.sweep --what methods` under the same base directory, where there are some.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from jel.errors import JelError
from jel.policy_lstm import default_lhopt_path, load_lhopt_policy
from nanochat.common import UserError, print0, run_main
from nanochat.files import read_json
from scripts import base_train
from scripts.ablate.__main__ import run
from scripts.lhopt.evaluate import policy_path
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.report.statistics import compare, summarize
from scripts.runs import run_folder

# what is added to a row's name, --controller, what is added to its folders' names
CONTROLLERS = (("", "lhopt", "-probed"), (", no held-out loss", "jel.lhopt:LhoptController", ""))
FIXED = (1.0, 3.0, 10.0, 17.8, 31.6, 56.2, 100.0)  # multipliers of the base rate, held
METHODS = {
    "hand_tuned": "hand-tuned rates",
    "best_constant": "the uniform base under the best fixed multipliers",
    "suboptimal": "the uniform base, no controller",
    "jel": "JEL, one policy a seed",
}
AGAINST = METHODS["best_constant"]


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument("--policies", nargs="*", default=[], help="tags under runs/, or paths; none: the shipped one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46])
    parser.add_argument("--fixed", action="store_true", help="run fixed multipliers too, every seed of each")
    return parser


def runs(preset: str, name: str, given: Sequence[str], seeds: Sequence[int]) -> dict[int, float]:
    """Test bits per byte by seed; runs what is not there yet."""
    found = {}
    for seed in seeds:
        folder = run_folder(tag := f"{preset}/lhopt/{name}-s{seed}")
        common = ["--preset", preset, "--seed", str(seed), "--resume", "auto", "--eval-every", "0"]
        if not (folder / "result.json").exists():
            if not run(["scripts.base_train", *common, *given, "--model-tag", tag], folder):
                raise UserError("stopped; run the same command again to go on")
        result = read_json(folder / "result.json", "result")
        found[seed] = result["test_bpb"]
        recovered = f", {result['recoveries']} recoveries" if result["recoveries"] else ""
        print0(f"{name} seed {seed}: {result['test_bpb']:.4f} test bpb{recovered}")
    return found


def known(preset: str, method: str, seeds: Sequence[int]) -> dict[int, float]:
    """The same of a method of Table 1, whose runs must be there."""
    paths = {seed: run_folder(f"{preset}/{method}-s{seed}") / "result.json" for seed in seeds}
    return {seed: read_json(path, "result")["test_bpb"] for seed, path in paths.items() if path.exists()}


def table(rows: Mapping[str, Mapping[int, float]]) -> str:
    """Mean and deviation by method, and each one's paired difference from the best fixed multipliers: Markdown."""
    lines = ["| method | test bpb | seeds | minus the best fixed multipliers, 95% interval |", "|---|---|---|---|"]
    for name, values in rows.items():
        s = summarize(list(values.values()))
        spread = "" if s.std is None else f" ± {s.std:.4f}"
        difference = ""
        if AGAINST in rows and name != AGAINST:
            c = compare(dict(values), dict(rows[AGAINST]))
            if c.interval:
                difference = f"{c.difference:+.4f} ({c.interval[0]:+.4f}, {c.interval[1]:+.4f})"
        lines.append(f"| {name} | {s.mean:.4f}{spread} | {s.n} | {difference} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_with_preset(flags(), "lhopt", argv)
    every_run = parse_with_preset(base_train.flags(), "base_train", ["--preset", args.preset])
    if every_run.num_iterations == -1:
        raise UserError("this preset derives its length; give tiny or small")
    rows: dict[str, dict[int, float]] = {}
    for method, label in METHODS.items():
        if values := known(args.preset, method, args.seeds):
            rows[label] = values
    for multiplier in FIXED if args.fixed else ():
        given = ["--hparams", "uniform", "--base-lr", f"{1e-3 * multiplier:g}"]
        rows[f"the uniform base, rates x {multiplier:g}"] = runs(args.preset, f"x{multiplier:g}", given, args.seeds)
    paths = [policy_path(name) for name in args.policies] or [default_lhopt_path()]
    for label, path in zip(args.policies or ["shipped"], paths):
        _, card = load_lhopt_policy(path)
        interval = ["--decision-interval", str(-(-every_run.num_iterations // int(card["decisions"])))]
        for what, controller, suffix in CONTROLLERS:
            given = ["--hparams", "uniform", "--controller", controller, "--policy", str(path.resolve()), *interval]
            rows[f"LHOPT {label}{what}"] = runs(args.preset, card["sha256"][:12] + suffix, given, args.seeds)
    print0("\n" + table(rows))
    return 0


if __name__ == "__main__":
    run_main(main, JelError)
