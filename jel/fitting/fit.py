"""`jel.fit`: a budget, a task, a schedule. Read from top to bottom; the parts are in this folder.

1. measure what an episode costs, make a plan that fits the budget, print it;
2. learn: groups of short episodes, a policy update after each (or a search, to compare with);
3. compare what was learned with the untouched base on fresh seeds, and hand it out only if it is better.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jel.errors import JelError
from jel.files import json_bytes
from jel.fitting.answer import surest
from jel.fitting.base import Base, as_base, describe_knobs, knobs_for
from jel.fitting.compare import FRESH, candidate, judge, run_side_by_side
from jel.fitting.plan import FitConfig, Plan, Price, make_plan, measure
from jel.fitting.result import FitResult, in_words, progress_line
from jel.fitting.sparse import EndsOnly
from jel.fitting.state import StopRequest, load_state, save_state
from jel.knobs import Knob
from jel.learn.meta import MetaTrainer
from jel.learn.rollout import Interrupted
from jel.learn.search import SearchTrainer
from jel.policy import multiplier_table
from jel.schedule import make_schedule
from jel.schedules import constant
from jel.tasks.base import Task

# not the searches that look at the probe in the middle of an episode, which is not measured there (EndsOnly)
METHODS = ("jel", "cma", "random")


def fit(
    task: Task,
    *,
    budget: float = 1.0,
    base: Base | Mapping[str, Any] | str | float | None = None,
    method: str = "jel",
    folder: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    config: FitConfig | None = None,
    say: Callable[[str], None] = print,
) -> FitResult:
    """Learn a schedule for a task's base from short episodes, at the price of `budget` runs of the task.

    `task`: a `LoopTask` (jel/tasks/loop.py), whose episodes are made as long as the budget allows, or any `Task`, whose
    episodes are taken as the runs. `base`: how far multipliers may go, see `as_base`; by default ten times either way.
    `method`: "jel" learns a policy of progress; "cma" and "random" search for constants at the same price.
    `folder`: where state and result are kept; Ctrl-C and SIGTERM then stop after the present decision, and
    `resume=True` goes on, bit for bit as if never stopped. `seed`: all that is random in the search. `config`: numeric
    choices. `say` gets the lines for a person.

    Returns the schedule only if it beats the untouched base on fresh seeds by more than the noise, else
    `constant(1.0)`; `result.card` says which. Raises `JelError` in one line for bad input, before anything is run
    where that can be known.
    """
    config, ranges = FitConfig() if config is None else config, as_base(base)
    _check(task, budget, method)
    if not isinstance(config, FitConfig):
        raise JelError(f"config is a jel.fitting.FitConfig, not {type(config).__name__}")
    if type(seed) is not int:
        raise JelError(f"seed is {seed!r}; it must be an int")
    if resume and folder is None:
        raise JelError("resume=True needs the folder of the fit that was stopped")
    where = Path(folder) if folder is not None else None
    if where and where.exists() and not where.is_dir():
        raise JelError(f"folder {where} is a file; give a folder")
    knobs = knobs_for(task, ranges, config.most_corrections)

    # -------------------------------------------------------------------------
    # the plan, or the one that is gone on with

    asked = _plain(
        {
            "task": getattr(task, "name", type(task).__name__),
            "groups": getattr(task, "facts", task.groups),
            "run_steps": task.num_steps(0),
            "budget": float(budget),
            "base": asdict(ranges),
            "method": method,
            "seed": seed,
            "config": asdict(config),
        }
    )
    saved = load_state(where) if where else None
    if saved and not resume:
        raise JelError(f"{where} holds a fit already; give resume=True to go on with it, or another folder")
    if saved:
        facts, state = saved
        if differing := [key for key in asked if facts["asked"].get(key) != asked[key]]:
            raise JelError(f"the fit in {where} was begun with another {', '.join(differing)}; resume with the same")
        plan, price, records, losses = (
            Plan.from_json(facts["plan"]),
            Price(**facts["price"]),
            facts["records"],
            facts["losses"],
        )
        spent = facts["seconds"]
    else:
        price = measure(task, knobs, config)
        resizable = hasattr(task, "with_steps")
        plan = make_plan(task.num_steps(0), budget, price, config, not resizable)
        state, records, losses, spent = None, [], [], 0.0
    way = getattr(task, "way", None)
    say(f"fit {asked['task']}: {method}, turning {describe_knobs(knobs, task)}")
    if way is not None:
        say(f"episodes run {way}")
    for line in plan.lines(price):
        say(line)
    episodes, compared = _of_length(task, plan.episode_steps), [_of_length(task, n) for n in plan.check_lengths]

    # -------------------------------------------------------------------------
    # learn

    stop, recipe = StopRequest(), config.recipe(plan, knobs)
    trainer: MetaTrainer | SearchTrainer
    if method == "jel":
        trainer = recipe.trainer(
            EndsOnly(episodes), seed, seed + 1, seed + 2, plan.group, stop_requested=stop.requested
        )
    else:
        trainer = recipe.searcher(method, EndsOnly(episodes), seed, plan.group, stop_requested=stop.requested)
    if state is not None:
        trainer.load_state_dict(state["trainer"])
        say(f"resumed after update {trainer.updates} of {plan.updates}")

    def keep() -> None:
        if where:
            facts = {"asked": asked, "plan": asdict(plan), "price": asdict(price), "records": records}
            save_state(where, {**facts, "losses": losses, "seconds": spent}, {"trainer": trainer.state_dict()})

    try:
        with stop.listening():
            try:
                while trainer.updates < plan.updates:
                    record = trainer.update()
                    spent += record["seconds"]
                    records.append(
                        {key: record[key] for key in ("returns", "probe_first", "probe_last", "episodes_alive")}
                    )
                    pace = spent / len(records)
                    say(progress_line(record, trainer.updates, plan.updates, pace * (plan.updates - trainer.updates)))
                    keep()
            except Interrupted:
                pass

            # ---------------------------------------------------------------------
            # compare

            if not stop.requested():
                if isinstance(trainer, MetaTrainer) and not recipe.compare:
                    learned = surest(trainer)
                else:
                    points = [k / config.decisions for k in range(config.decisions)]
                    learned = multiplier_table(trainer.policy, points)
                ways = [candidate(way, learned, plan.carry(config.carry), knobs) for way in plan.ways]
            while not stop.requested() and len(losses) < plan.check_seeds:
                t0 = time.perf_counter()
                found = [run_side_by_side(of, FRESH + len(losses), ways, stop.requested) for of in compared]
                if None in found:
                    break
                losses.append(found)
                spent += time.perf_counter() - t0
                keep()
    finally:
        for each in {id(t): t for t in (episodes, *compared, task)}.values():
            each.close()
    if stop.requested():
        keep()
        _stopped(stop, trainer.updates, plan, where, say)

    # -------------------------------------------------------------------------
    # hand out

    result = _result(task, asked, plan, price, spent, records, learned, losses, knobs)
    say(result.card["verdict"])
    if where:
        result.save(where)
        say(f"schedule.json and card.json are in {where}")
    return result


# -----------------------------------------------------------------------------


def _check(task: Any, budget: Any, method: Any) -> None:
    if method not in METHODS:
        raise JelError(f"unknown method {method!r}; use one of {', '.join(METHODS)}")
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not (0 < budget < math.inf):
        raise JelError(f"budget is {budget!r}; it is the price in runs of the task, a number above 0")
    if missing := [name for name in ("groups", "num_steps", "reset", "train", "observe") if not hasattr(task, name)]:
        raise JelError(
            f"{type(task).__name__} is no task (it has no {missing[0]}); make one with jel.tasks.loop.LoopTask"
        )


def _plain(value: Any) -> Any:
    """As it comes back from JSON, where what is not finite is null."""
    return json.loads(json_bytes(value), parse_constant=lambda name: None)


def _of_length(task: Any, steps: int) -> Any:
    return task.with_steps(steps) if hasattr(task, "with_steps") and steps != task.num_steps(0) else task


def _stopped(stop: StopRequest, done: int, plan: Plan, where: Path | None, say: Callable[[str], None]) -> None:
    """End as the signal asks: Ctrl-C as KeyboardInterrupt, SIGTERM with status 75 (try again)."""
    then = f"go on with folder={str(where)!r}, resume=True" if where else "nothing was kept (no folder was given)"
    say(f"stopped after update {done} of {plan.updates}; {then}")
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(75)


def _result(
    task: Any,
    asked: dict,
    plan: Plan,
    price: Price,
    seconds: float,
    records: list[dict],
    learned: list[dict],
    losses: list[list[list[float]]],
    knobs: Sequence[Knob],
) -> FitResult:
    verdict = judge(losses, plan.check_lengths, plan.run_steps)
    kept = plan.ways[verdict.chosen] if verdict.better else "base"
    if kept == "base":
        schedule = constant(1.0)
    else:
        rows = candidate(kept, learned, plan.carry(asked["config"]["carry"]), knobs)
        source = f"jel.fit, {asked['method']}, {kept}"
        schedule = make_schedule(rows, source, getattr(task, "contract", None), knobs)
    card = {
        "format": "jel-fit-card",
        "version": 1,
        **asked,
        "optimizer": getattr(task, "optimizer_kind", None),
        "episodes_run": str(getattr(task, "way", "as the task runs them")),
        "plan": asdict(plan),
        "price": {
            "run_equivalents": plan.runs,
            "search": plan.search,
            "comparison": plan.check,
            "measuring": plan.measuring / plan.run_steps,
            "step_flops": price.step_flops,
            "seconds": seconds,
        },
        "returns": [record["returns"] for record in records],
        "learned": learned,
        "comparison": {
            "lengths": plan.check_lengths,
            "seeds": plan.check_seeds,
            "probe_loss": {way: [[of[i] for of in seed] for seed in losses] for i, way in enumerate(plan.ways)},
            "best": plan.ways[verdict.chosen],
            "gain": verdict.gain,
            "projected": verdict.at_end,
        },
        "kept": kept,
        "verdict": in_words(verdict, kept, plan),
    }
    return FitResult(schedule, _plain(card))
