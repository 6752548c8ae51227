"""The `jel` command.

    jel export POLICY --out schedule.json      a policy's schedule; .csv for other frameworks
    jel show schedule.json --png plot.png      in the terminal, and as a picture
    jel apply schedule.json my_module:make_optimizer --total-steps 1000 --dry-run
    jel fit my_module:task --out folder        learn a schedule for a task of yours
    jel watch RUN                              follow a run that is training

`jel COMMAND --help` names the flags of each.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jel.controller import PolicyController
from jel.errors import JelError
from jel.files import read_json, write_files
from jel.policy import default_policy_path
from jel.policy_lstm import FORMAT as LHOPT_FORMAT
from jel.schedule import FORMAT, checked_schedule, contract_of, export_schedule, save_schedule
from jel.show import as_csv, as_text, save_picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what the user can mend, in one line on standard error, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="jel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_export, _add_show, _add_apply, _add_fit, _add_watch):
        add(commands)
    args, rest = parser.parse_known_args(arguments)
    if rest and args.run is not _watch:  # `watch` knows its own flags
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return args.run(args) or 0
    except JelError as e:
        print(f"jel: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a fit has said by now how to go on with it
        return 130
    except BrokenPipeError:  # the reader, e.g. head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# -----------------------------------------------------------------------------
# schedules


def schedule_of(source: str, points: int) -> dict:
    """The schedule at a path, or that of the policy at a path ("jel", or "default": the shipped one) at `points`."""
    if source in ("jel", "default"):
        source = str(default_policy_path()) + ".json"
    path = Path(source)
    if path.suffix not in (".json", ".safetensors") and path.is_file():
        raise JelError(f"{source} is no schedule and no policy: give a .json, a policy's .safetensors, or jel")
    record = read_json(path, "schedule") if path.suffix == ".json" else {}
    if isinstance(record, dict) and record.get("format") == FORMAT:
        return checked_schedule(record, f"schedule {path}")
    if path.suffix == ".json" and not (isinstance(record, dict) and str(record.get("format")).endswith("-policy")):
        raise JelError(f"{path} is neither a schedule nor a policy's card")
    if record.get("format") == LHOPT_FORMAT:
        raise JelError(f"{path} is a policy that watches the run: it has no schedule before there is one")
    if points < 1:
        raise JelError(f"--points is {points}; give a number of decisions")
    controller = PolicyController(path)
    progresses = [i / points for i in range(points)]
    return export_schedule(controller.policy, progresses, controller.contract, controller.decay_carry)


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a policy's schedule, or a schedule as CSV")
    command.add_argument("source", metavar="POLICY|SCHEDULE", help='a path, or "jel" for the shipped policy')
    command.add_argument("--points", type=int, default=20, help="decisions to read off a policy")
    command.add_argument("--out", type=Path, help=".json or .csv; default: JSON to standard output")
    command.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    schedule = schedule_of(args.source, args.points)
    if args.out is None:
        print(json.dumps(schedule, indent=2))
    elif args.out.suffix == ".csv":
        write_files({args.out: as_csv(schedule).encode()})
    elif args.out.suffix == ".json":
        save_schedule(schedule, args.out)
    else:
        raise JelError(f"--out {args.out} must end in .json or .csv")


def _add_show(commands: Any) -> None:
    command = commands.add_parser("show", help="plot a schedule in the terminal")
    command.add_argument("source", metavar="POLICY|SCHEDULE")
    command.add_argument("--points", type=int, default=20, help="decisions to read off a policy")
    command.add_argument("--png", type=Path, help="also write a picture (needs matplotlib)")
    command.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    schedule = schedule_of(args.source, args.points)
    print(f"{schedule.get('source', 'schedule')}, {len(schedule['decisions'])} decisions")
    contract = contract_of(schedule)
    if contract is None:
        print("contract: none; only its shape can be used (--mode shape)")
    elif not contract.groups:
        print("contract: any optimizer")
    else:
        groups = "; ".join(
            f"{g.name} {g.kind} " + ", ".join(f"{k} {v:g}" for k, v in g.base.items()) for g in contract.groups
        )
        learned = "" if contract.steps is None else f"; learned on {contract.steps} steps"
        print(f"contract: {groups}; base schedule {contract.schedule or 'not said'}{learned}")
    print(as_text(schedule))
    if args.png:
        save_picture(schedule, args.png)
        print(f"picture: {args.png}")


# -----------------------------------------------------------------------------
# with code of the user's


def imported(spec: str) -> Any:
    """What `MODULE:NAME` names; the module may lie in the working directory. Raises `JelError` if it cannot be had."""
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise JelError(f"{spec!r} names nothing; give MODULE:NAME")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as e:  # a foreign module may fail in any way
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise JelError(f"{module_name} does not import ({reason})") from e
    if not hasattr(module, name):
        raise JelError(f"{module_name} has no {name}")
    return getattr(module, name)


def _called(function: Any, spec: str) -> Any:
    """What a function of the user's gives, called without arguments. Raises `JelError` if it fails."""
    try:
        return function()
    except JelError:
        raise
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise JelError(f"{spec}() fails ({reason[:300]})") from e


def _add_apply(commands: Any) -> None:
    command = commands.add_parser("apply", help="what a schedule would do to each param group of an optimizer")
    command.add_argument("schedule")
    command.add_argument("optimizer", metavar="MODULE:NAME", help="an optimizer, or a function that makes one")
    command.add_argument("--total-steps", type=int, required=True)
    command.add_argument("--mode", choices=["absolute", "shape"], default="absolute")
    command.add_argument("--dry-run", action="store_true", help="required: in training, jel.Scheduler applies it")
    command.set_defaults(run=_apply)


def _apply(args: argparse.Namespace) -> None:
    from jel.preview import preview, table

    if not args.dry_run:
        raise JelError("jel apply only shows: give --dry-run; in a training loop, jel.Scheduler applies a schedule")
    made = imported(args.optimizer)
    optimizer = _called(made, args.optimizer) if callable(made) else made
    print(table(preview(optimizer, args.total_steps, args.schedule, mode=args.mode)))


def _add_fit(commands: Any) -> None:
    command = commands.add_parser("fit", help="learn a schedule for a task of yours")
    command.add_argument("task", metavar="MODULE:NAME", help="a task, or a function that makes one")
    command.add_argument("--budget", type=float, default=1.0, help="in runs of the real length")
    command.add_argument("--method", default="jel", help="jel, cma or random")
    command.add_argument(
        "--base", help="how far multipliers may go: a name such as good, or a range of the learning rate"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--resume", action="store_true", help="go on with the fit in --out")
    command.add_argument("--out", type=Path, default=Path("jel-fit"), help="folder of schedule, card and picture")
    command.set_defaults(run=_fit)


def _fit(args: argparse.Namespace) -> None:
    from jel.fitting.fit import fit

    made = imported(args.task)
    task = made if hasattr(made, "num_steps") and not inspect.isclass(made) else _called(made, args.task)
    base = _number(args.base) if args.base else None
    choices = {"budget": args.budget, "method": args.method, "seed": args.seed, "resume": args.resume}
    result = fit(task, base=base, folder=args.out, **choices)
    result.save(args.out)
    print(as_text(result.schedule))
    try:
        result.plot(args.out / "fit.png")
    except JelError as e:
        print(f"no picture: {e}")
    print(f"saved: {args.out / 'schedule.json'}")


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _add_watch(commands: Any) -> None:
    commands.add_parser("watch", help="follow a run that is training", add_help=False).set_defaults(run=_watch)


def _watch(args: argparse.Namespace) -> int:
    from jel.watch import add_arguments, run_command

    parser = argparse.ArgumentParser(prog="jel watch")
    add_arguments(parser)
    return run_command(parser.parse_args(args.rest))


if __name__ == "__main__":
    sys.exit(main())
