"""The examples measured: what each method ends with on test data, over seeds, each beside the price of its settings.

    python -m examples.compare                           resumable: what is in examples/results.json is not run again
    python -m examples.compare --again --methods jel     but this is
    python -m examples.compare --table                   print the tables of docs/examples.md

A seed draws the split of the data, initialisation, the order of the data, and the search. Whatever chooses, reads the
probe data; the test data is read once, by the final run. A price is in runs of the example, the final one not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import jel
from jel.files import json_bytes, write_files

EXAMPLES = ("digits_cnn", "tabular_mlp", "char_transformer", "hf_trainer", "lightning_module")
SCORES = tuple[float, float, dict]  # test loss, price in runs, what was chosen
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def flat(optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1.0)


def default(example, seed: int, done: dict) -> SCORES:
    """The optimizer as it is, under no schedule, or the framework's own."""
    return example.run(example.make_optimizer, getattr(example, "default_schedule", flat), seed), 0.0, {}


def cosine(example, seed: int, done: dict) -> SCORES:
    return example.run(example.make_optimizer, CosineAnnealingLR, seed), 0.0, {}


def schedule_free(example, seed: int, done: dict) -> SCORES:
    """Its defaults, with a warm-up over 5% of the run."""
    from schedulefree import AdamWScheduleFree

    def make(model):
        optimizer = AdamWScheduleFree(model.parameters())
        plain = model.train

        def train(mode: bool = True):  # the weights to evaluate are others than those to train
            optimizer.train() if mode else optimizer.eval()
            return plain(mode)

        model.train = train
        optimizer.train()
        return optimizer

    def warmed(optimizer: Optimizer, steps: int) -> LambdaLR:
        for group in optimizer.param_groups:
            group["warmup_steps"] = steps // 20
        return flat(optimizer, steps)

    return example.run(make, warmed, seed), 0.0, {}


def prodigy(example, seed: int, done: dict) -> SCORES:
    """Learning rate 1 under a cosine, as its authors advise."""
    from prodigyopt import Prodigy

    make = lambda model: Prodigy(model.parameters(), lr=1.0, weight_decay=0.01)
    return example.run(make, CosineAnnealingLR, seed), 0.0, {}


def optuna(example, seed: int, done: dict) -> SCORES:
    """Whole runs under a cosine, learning rate and weight decay by TPE: as many as the budget of `jel.fit` pays for."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def with_values(lr: float, weight_decay: float) -> Callable:
        def make(model):
            optimizer = example.make_optimizer(model)
            for group in optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = (
                    weight_decay if group["weight_decay"] or len(optimizer.param_groups) == 1 else 0.0
                )
            return optimizer

        return make

    def objective(trial) -> float:
        values = trial.suggest_float("lr", 1e-5, 1e-1, log=True), trial.suggest_float("wd", 1e-4, 1.0, log=True)
        loss = example.run(with_values(*values), CosineAnnealingLR, seed, split=1)
        return loss if math.isfinite(loss) else 1e9

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=int(example.BUDGET))
    best = study.best_params
    loss = example.run(with_values(best["lr"], best["wd"]), CosineAnnealingLR, seed)
    return loss, float(int(example.BUDGET)), best


def learned(example, seed: int, base: str, method: str = "jel") -> SCORES:
    """`jel.fit` on the flat base."""
    task = example.make_task(seed)
    task.workers = 1  # one process
    result = jel.fit(task, budget=example.BUDGET, base=base, method=method, seed=seed, say=lambda line: None)
    loss = example.run(example.make_optimizer, lambda o, steps: jel.Scheduler(o, steps, result.schedule), seed)
    card = result.card
    chosen = {"kept": card["kept"], "verdict": card["verdict"], "learned": card["learned"]}
    return loss, card["price"]["run_equivalents"], {**chosen, "schedule": result.schedule["decisions"]}


def held_constant(example, seed: int, done: dict) -> SCORES:
    """The control: what "jel rough" chose, its geometric mean over progress held for the whole run."""
    chosen = done[f"{example.__name__.partition('.')[2]}/jel rough/{seed}"]
    rows = [decision["multipliers"] for decision in chosen["schedule"]]
    mean = {g: {k: statistics.geometric_mean(row[g][k] for row in rows) for k in rows[0][g]} for g in rows[0]}
    schedule = jel.schedules.piecewise([(0.0, mean)])
    loss = example.run(example.make_optimizer, lambda o, steps: jel.Scheduler(o, steps, schedule), seed)
    return loss, chosen["price"], {"multipliers": mean}


METHODS: dict[str, Callable[..., SCORES]] = {
    "default": default,
    "cosine": cosine,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
    "optuna": optuna,
    "jel": lambda example, seed, done: learned(example, seed, "good"),
    "jel rough": lambda example, seed, done: learned(example, seed, "rough"),
    "jel rough, constant": held_constant,
    "cma rough": lambda example, seed, done: learned(example, seed, "rough", "cma"),
}


# -----------------------------------------------------------------------------
# the tables


def tables(results: dict, names: list[str]) -> str:
    """Markdown: test losses and prices, then the differences of `jel` and `jel rough` to the others, with verdicts."""
    found = {m: {n: [r[1] for r in sorted(_of(results, n, m).items())] for n in names} for m in METHODS}
    found = {m: of for m, of in found.items() if any(of.values())}
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method, of in found.items():
        lines.append(f"| {method} | " + " | ".join(_score(of[n]) for n in names) + " |")
    for ours in ("jel", "jel rough"):
        lines += ["", f"| {ours} minus | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for method in found:
            if method != ours:
                cells = [_difference(_of(results, n, ours), _of(results, n, method)) for n in names]
                lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(results: dict, example: str, method: str) -> dict[int, dict]:
    keys = {key: key.split("/") for key in results}
    return {int(seed): results[key] for key, (e, m, seed) in keys.items() if (e, m) == (example, method)}


def _score(rows: list[dict]) -> str:
    losses = [row["test_loss"] for row in rows]
    if not losses:
        return ""
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    spread += f", n = {len(losses)}" if len(losses) < 5 else ""
    price = statistics.mean(row["price"] for row in rows)
    return f"{statistics.mean(losses):.3f}{spread}" + (f" ({price:.1f} runs)" if price else "")


def _difference(ours: dict[int, dict], theirs: dict[int, dict]) -> str:
    """The paired difference, its 95% interval by Student's t, and the verdict; below 0 ours is better.

    "not shown": the interval holds 0.
    """
    pairs = [ours[s]["test_loss"] - theirs[s]["test_loss"] for s in sorted(ours.keys() & theirs.keys())]
    if len(pairs) < 2:
        return ""
    if not any(pairs):
        return "the same"
    mean, half = statistics.mean(pairs), T975[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    verdict = "better" if mean + half < 0 else "**worse**" if mean - half > 0 else "not shown"
    verdict = verdict if len(pairs) >= 5 else f"n = {len(pairs)}, no verdict"
    return f"{mean:+.3f} ({mean - half:+.3f}, {mean + half:+.3f}) {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"), metavar="JSON")
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=EXAMPLES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--again", action="store_true", help="run again what is there")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and run nothing")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.table:
        print(tables(results, args.examples))
        return
    if args.again:
        asked = {f"{name}/{m}/{seed}" for name in args.examples for m in args.methods for seed in args.seeds}
        results = {key: row for key, row in results.items() if key not in asked}
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for seed in args.seeds:
        for name in args.examples:
            example = importlib.import_module(f"examples.{name}")
            for method in args.methods:
                key = f"{name}/{method}/{seed}"
                if key in results:
                    continue
                start = time.process_time()
                loss, price, chosen = METHODS[method](example, seed, results)
                seconds = time.process_time() - start
                results[key] = {"test_loss": loss, "price": price, "core_seconds": seconds, **chosen}
                write_files({args.out: json_bytes(results)})
                print(f"{key}: test loss {loss:.4f}, price {price:.1f} runs, {seconds:.1f} core-seconds", flush=True)


if __name__ == "__main__":
    main()
