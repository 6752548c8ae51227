"""What fits into so many minutes: measures a training step and an episode step, and plans runs, seeds and updates.

    python -m scripts.plan --preset paper --minutes 25                what `bash speedrun.sh --minutes 25` will do
    python -m scripts.plan --preset paper --minutes 25 --seeds 42     for these seeds

Prints the plan for people on stderr and, for the shell, as one line of NAME=VALUE on stdout. The first plan is kept in
$NANOCHAT_BASE_DIR/runs/<preset>/plan.json and holds until that file is deleted: a second start goes on with it.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch

from nanochat.common import Compute, UserError, base_dir, init_compute, run_main
from nanochat.files import read_json, write_json
from nanochat.run_log import format_seconds
from scripts import base_train, meta_train
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.sweep import __main__ as sweep
from scripts.sweep.settings import HAND_TUNED, METHODS, PAPER_STEPS, SCHEDULE_FREE, SCHEDULE_FREE_FAIR

SHARE = 0.85  # of the time that is planned: the rest is for what was not measured (assumption)
FEWEST_UPDATES = 4
LENGTHS = (1.0, 0.75, 0.5, 0.25, 0.125)  # of a run, as parts of the preset's


# -----------------------------------------------------------------------------
# planning, as pure functions


@dataclass(frozen=True)
class Costs:
    """Seconds of a training step, of a step of a group of episodes, and of the start of a process.

    `eval_steps`: one validation, in training steps. `side_by_side`: runs that a sweep trains at a time.
    """

    step: float
    episode_step: float
    start: float
    eval_steps: float
    side_by_side: int


@dataclass(frozen=True)
class Plan:
    """Numbers of seeds, settings of the sweeps (schedule-free, the fair share of it, hand-tuned), constants, updates.

    `steps`: of a training run. `episode_steps`: of an episode, with its probes counted as steps.
    """

    seeds: int
    settings: int
    fair: int
    tuned: int
    constants: int
    updates: int
    steps: int
    episode_steps: float
    validations: int = 5  # of a run of a method, the test split's included

    @property
    def runs(self) -> int:
        """Training runs in all."""
        return self.settings + self.fair + self.tuned + self.constants + len(METHODS) * self.seeds


def seconds_of(plan: Plan, costs: Costs) -> dict[str, float]:
    """Seconds of the plan by stage; a run under way on each of `side_by_side` places."""
    setting = costs.start + costs.step * (plan.steps + costs.eval_steps)
    method = costs.start + costs.step * (plan.steps + plan.validations * costs.eval_steps)

    def rounds(runs: int) -> int:
        return math.ceil(runs / costs.side_by_side)

    settings = sum(rounds(n) for n in (plan.settings, plan.fair, plan.tuned, plan.constants))
    meta = plan.seeds * (costs.start + plan.updates * plan.episode_steps * costs.episode_step)
    return {
        "settings": settings * setting,
        "meta-training": meta,
        "methods": rounds(len(METHODS) * plan.seeds) * method,
    }


def plans(wish: Plan) -> Iterator[Plan]:
    """From all that is wished for to the least, in the order in which things are given up.

    First the further settings, then settings of each sweep, then seeds (below 5 there is no verdict anyway), then
    updates of the policy, and last the length of a run: a shorter run is another experiment.
    """
    few = replace(wish, fair=0)
    yield from (wish, few)
    for n in (4, 2, 1):
        few = replace(few, **{name: min(n, getattr(few, name)) for name in ("settings", "tuned")})
        few = replace(few, constants=min(max(2, n), few.constants))
        yield few
    for seeds in range(wish.seeds - 1, 0, -1):
        few = replace(few, seeds=seeds)
        yield few
    while few.updates > FEWEST_UPDATES:
        few = replace(few, updates=max(FEWEST_UPDATES, few.updates // 2))
        yield few
    for length in LENGTHS[1:]:
        yield replace(few, steps=max(1, round(length * wish.steps)))


def largest(wish: Plan, costs: Costs, seconds: float) -> Plan | None:
    """The first of `plans` that fits, or None if not even the last one does."""
    return next((plan for plan in plans(wish) if sum(seconds_of(plan, costs).values()) <= seconds), None)


def describe(plan: Plan, wish: Plan, costs: Costs, seconds: float) -> list[str]:
    """The plan in words, with what it leaves out."""
    stages = ", ".join(f"{name} {format_seconds(s)}" for name, s in seconds_of(plan, costs).items())
    total = sum(seconds_of(plan, costs).values())
    lines = [
        f"measured: a training step {1e3 * costs.step:.1f} ms, a step of a group of episodes "
        f"{1e3 * costs.episode_step:.1f} ms, a start {costs.start:.0f} s; {costs.side_by_side} runs side by side",
        f"plan: {plan.runs} runs of {plan.steps} steps: {plan.seeds} seeds x {len(METHODS)} methods, "
        f"{plan.settings} + {plan.fair} schedule-free settings, {plan.tuned} hand-tuned, {plan.constants} constants; "
        f"{plan.updates} updates of meta-training a seed",
        f"time: {format_seconds(total)} of {format_seconds(seconds)} ({stages})",
    ]
    left_out = [
        f"{getattr(plan, name)} of {getattr(wish, name)} {what}"
        for name, what in {
            "seeds": "seeds",
            "settings": "schedule-free settings",
            "fair": "further ones",
            "tuned": "hand-tuned settings",
            "constants": "constants",
            "updates": "updates",
        }.items()
        if getattr(plan, name) < getattr(wish, name)
    ]
    if left_out:
        lines.append(f"left out to fit: {', '.join(left_out)}")
    if plan.steps < wish.steps:
        lines.append(f"runs are cut to {plan.steps} of {wish.steps} steps: numbers are not the preset's")
    return lines


# -----------------------------------------------------------------------------
# measuring


def measure(preset: str, compute: Compute) -> Costs:
    """The costs on this machine, from a few steps each; what compiles does so before the clock runs."""
    from scripts.bench.cases import case_step
    from scripts.bench.shapes import preset_shapes, tokens

    step, episode, train, meta = preset_shapes(preset)
    seconds = []
    for spec in ({**step, "accumulation": step["accumulation"]}, {**episode, "runs": meta.episodes}):
        turn, times = case_step({"form": "ours", **spec}, compute), []
        for i in range(7):
            compute.synchronize()
            begin = time.perf_counter()
            turn()
            compute.synchronize()
            if i >= 2:
                times.append(time.perf_counter() - begin)
        seconds.append(sorted(times)[len(times) // 2])
        del turn
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import scripts.base_train"], check=True)
    start = time.perf_counter() - begin
    if compute.is_cuda:  # the programs are compiled once and kept on the disk; taking one from there is timed
        torch._dynamo.reset()
        begin = time.perf_counter()
        case_step({"form": "ours", **step}, compute)()
        compute.synchronize()
        start += time.perf_counter() - begin
    args = argparse.Namespace(jobs=-1, nproc=-1)
    side_by_side = sweep.find_devices(args, train, 10**6).jobs
    if not compute.is_cuda and side_by_side > 1:
        seconds[0] *= 1.3  # runs side by side share the memory: assumption, from docs/speed.md
    return Costs(*seconds, start, train.eval_tokens / 3 / tokens(step), side_by_side)


def wished(preset: str, seeds: int) -> Plan:
    """All that `speedrun.sh` runs without a limit."""
    train = parse_with_preset(base_train.flags(), "base_train", ["--preset", preset])
    meta = parse_with_preset(meta_train.flags(), "meta_train", ["--preset", preset])
    most = parse_with_preset(sweep.flags(), "sweep", ["--preset", preset, "--what", "methods"]).settings or 10**6
    steps = train.num_iterations if train.num_iterations > 0 else PAPER_STEPS
    decisions = math.ceil(meta.num_iterations / meta.decision_interval)
    return Plan(
        seeds=seeds,
        settings=min(most, len(SCHEDULE_FREE)),
        fair=min(most, len(SCHEDULE_FREE_FAIR)),
        tuned=0 if preset == "paper" else min(most, len(HAND_TUNED)),
        constants=min(most, 12),
        updates=meta.updates,
        steps=steps,
        episode_steps=meta.num_iterations + meta.probe_batches * (decisions + 1) / 3,
        validations=2 + (steps - 1) // train.eval_every + 1 if train.eval_every > 0 else 2,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset_flag(parser)
    parser.add_argument("--minutes", type=float, required=True, help="from now on")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    args = parse_with_preset(parser, "plan")
    if not 0 < args.minutes < math.inf:
        raise UserError(f"--minutes is {args.minutes}; give a positive number")
    seeds = (
        args.seeds or parse_with_preset(sweep.flags(), "sweep", ["--preset", args.preset, "--what", "methods"]).seeds
    )
    path = base_dir() / "runs" / args.preset / "plan.json"
    if path.exists():
        try:
            saved = read_json(path, "plan")
            plan, seeds = Plan(**saved["plan"]), [int(seed) for seed in saved["seeds"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is not a plan; delete it, and a new one is made") from None
        print(f"plan: going on with that of {path}; delete it for a new one", *saved["said"], sep="\n", file=sys.stderr)
    else:
        begin = time.perf_counter()
        wish, costs = wished(args.preset, len(seeds)), measure(args.preset, init_compute())
        seconds = SHARE * max(0.0, 60 * args.minutes - (time.perf_counter() - begin))
        plan = largest(wish, costs, seconds)
        if plan is None:
            least = sum(seconds_of([*plans(wish)][-1], costs).values())
            raise UserError(
                f"nothing fits into {args.minutes:g} minutes: the least, one seed of {round(LENGTHS[-1] * 100)}% long "
                f"runs, takes {format_seconds(least / SHARE)}; give more, or another preset"
            )
        seeds, said = seeds[: plan.seeds], describe(plan, wish, costs, seconds)
        shorter = plan.steps < wish.steps
        write_json(
            path, {"plan": asdict(plan), "seeds": seeds, "said": said, "costs": asdict(costs)} | {"cut": shorter}
        )
        saved = read_json(path, "plan")
        print(*said, sep="\n", file=sys.stderr)
    steps = plan.steps if saved.get("cut") else -1
    words = {name: getattr(plan, name) for name in ("settings", "fair", "tuned", "constants", "updates")}
    print(f"seeds=({' '.join(map(str, seeds))})", *(f"{k}={v}" for k, v in words.items()), f"steps={steps}")
    return 0


if __name__ == "__main__":
    run_main(main)
