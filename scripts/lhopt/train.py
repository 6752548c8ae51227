"""Meta-train LHOPT: groups of episodes on the small tasks of the bank, PPO after each batch of groups.

    python -m scripts.meta_train --recipe lhopt                      89,600 episodes, about 18 minutes of one core
    torchrun --standalone --nproc_per_node 4 -m scripts.meta_train --recipe lhopt    the same policy from 4 processes
    python -m scripts.lhopt.train --preset smoke                     a minute, for tests
    python -m scripts.lhopt.train --no-cdf --model-tag lhopt/no-cdf  an ablation; see --help for the others

Computes the bank first (cached, a file a task). Writes $NANOCHAT_BASE_DIR/runs/<tag>/: config.json, log.jsonl,
checkpoints/, policy.safetensors, policy.json, result.json. Killed and started again, it ends with the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import torch

from jel.errors import JelError
from jel.learn.control_meta import REWARDS, Episode
from jel.learn.ppo import PPOConfig
from jel.policy_lstm import save_lhopt_policy
from jel.recipes.lhopt import KNOBS, LhoptRecipe
from jel.tasks.small.bank import BankTask, check_bank, describe, load_bank, worth_learning
from jel.tasks.small.kinds import HELD_OUT, TRAINING
from jel.unitless import END_WEIGHTS
from nanochat.checkpoint import CheckpointWriter, load_checkpoint_together, untrusted
from nanochat.common import Compute, base_dir, init_compute, print0, run_main
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import RunLog, Stopwatch, environment_record, format_seconds
from scripts.runs import LARGEST, check_numbers, check_same_flags, hold, is_finished, resumable_flags, run_folder

TASKS_PER_KIND = 7
MAY_CHANGE = {"resume", "model_tag", "workers", "save_every", "stop_after"}
PRESETS = {
    "tiny": {},
    "smoke": {
        "updates": 3,
        "tasks_per_kind": 1,
        "groups": 2,
        "episodes": 4,
        "kinds": ["quadratic", "tabular"],
        "decisions": 10,
    },
}


# -----------------------------------------------------------------------------
# flags


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--recipe", choices=["lhopt"], default="lhopt", help="taken from scripts.meta_train")
    flag("--preset", choices=list(PRESETS), default="tiny")
    flag("--seed", type=int, default=42)
    flag("--updates", type=int, default=LhoptRecipe.updates)
    flag("--model-tag", default="", help="folder under runs/; default lhopt/<preset>-s<seed>")
    flag("--resume", choices=["auto", "none"], default="auto")
    flag("--save-every", type=int, default=20, help="updates")
    flag("--stop-after", type=int, default=0, help="leave after this update, as if stopped; 0: never")
    flag("--workers", type=int, default=1, help="processes that share the groups; the result is the same")
    # the tasks
    flag("--kinds", nargs="+", choices=TRAINING, default=list(TRAINING))
    flag("--tasks-per-kind", type=int, default=TASKS_PER_KIND)
    flag("--without-kinds", nargs="*", choices=TRAINING, default=[], help="ablation: leave kinds out")
    # the policy
    flag("--knobs", nargs="+", choices=list(KNOBS), default=list(KNOBS))
    flag("--paper-steps", action="store_true", help="the paper's seven steps of the rate, without x0.25 and x4")
    flag("--no-cdf", action="store_true", help="ablation: no historical CDFs")
    flag("--no-recurrence", action="store_true", help="ablation: a layer in the place of the LSTM")
    flag("--hidden", type=int, default=LhoptRecipe.hidden)
    flag("--registers", type=int, default=0, help="checkpoints that the policy may save and load")
    # learning
    flag("--groups", type=int, default=Episode.groups, help="tasks an update")
    flag("--episodes", type=int, default=Episode.episodes, help="of a task, side by side")
    flag("--decisions", type=int, default=Episode.decisions)
    flag("--reward", choices=REWARDS, default="score", help="normalised score, or log speed-up over the averaged actor")
    flag("--policy-lr", type=float, default=PPOConfig.lr)
    flag("--entropy-coef", type=float, default=PPOConfig.entropy_coef)
    flag("--no-critic", action="store_true", help="ablation: the group's mean return in the place of a value function")
    flag("--no-privileged", action="store_true", help="ablation: the value function sees what the policy sees")
    flag(
        "--keep",
        type=int,
        default=Episode.keep,
        help="a run ends with the mean of so many of its best weights on validation; 0, an ablation: with its last",
    )
    flag("--retreats", type=int, default=Episode.retreats, help="times that a run may go back to its best weights")
    flag("--fixed-starts", action="store_true", help="ablation: every episode starts from the defaults")
    return parser


def asked_for(argv: list[str]) -> bool:
    """Whether `scripts.meta_train` was given --recipe lhopt: this program is then run in its place."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe")
    return parser.parse_known_args(argv)[0].recipe == "lhopt"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags()
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    args.model_tag = args.model_tag or f"lhopt/{args.preset}-s{args.seed}"
    most = (1, LARGEST)
    whole = ["updates", "save_every", "workers", "tasks_per_kind", "hidden", "groups", "decisions"]
    from_zero = ["keep", "retreats", "policy_lr", "entropy_coef"]
    check_numbers(args, {most: whole, (2, LARGEST): ["episodes"], (0, 8): ["registers"], (0, LARGEST): from_zero})
    return args


def make_recipe(args: argparse.Namespace) -> LhoptRecipe:
    episode = Episode(
        decisions=args.decisions,
        groups=args.groups,
        episodes=args.episodes,
        reward=args.reward,
        keep=args.keep,
        retreats=args.retreats,
        default_starts=1.0 if args.fixed_starts else Episode.default_starts,
    )
    ppo = PPOConfig(
        lr=args.policy_lr,
        entropy_coef=args.entropy_coef,
        critic=not args.no_critic,
        privileged=not args.no_privileged,
    )
    return LhoptRecipe(
        knobs=tuple(args.knobs),
        paper_steps=args.paper_steps,
        end_weights=() if args.no_cdf else END_WEIGHTS,
        hidden=args.hidden,
        registers=args.registers,
        recurrent=not args.no_recurrence,
        updates=args.updates,
        episode=episode,
        ppo=ppo,
    )


def bank_folder() -> Path:
    return base_dir() / "lhopt" / "bank"


def training_tasks(args: argparse.Namespace, compute: Compute) -> list[BankTask]:
    """The bank's tasks that are worth learning from; prints what was dropped, and checks that they differ enough."""
    kinds = [kind for kind in args.kinds if kind not in args.without_kinds]
    t0 = time.perf_counter()
    tell = lambda t: print0(f"bank: {describe(t)}") if time.perf_counter() - t0 > 5 else None
    load = lambda: load_bank(kinds, range(args.tasks_per_kind), bank_folder(), tell)
    with compute.together():  # one rank computes what is missing, the others read it
        tasks = load() if compute.is_main else []
    kept = worth_learning(tasks or load())
    many = len(kinds) * args.tasks_per_kind
    print0(f"bank: {len(kept)} of {many} tasks, the others' gap is below 3 standard errors")
    if args.preset != "smoke":
        score, setting = check_bank(kept)
        print0(f"bank: the best fixed setting, {setting}, scores {score:.2f}")
    return kept


# -----------------------------------------------------------------------------
# main


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # a group is small: more threads would only wait for each other
    compute = init_compute("cpu")
    stop, folder = StopRequest(compute), run_folder(args.model_tag)
    _lock = hold(folder, compute, wait=args.resume == "auto")
    if is_finished(folder, args, MAY_CHANGE):
        print0(f"already finished: {folder}")
        return 0
    tasks = training_tasks(args, compute)
    trainer = make_recipe(args).trainer(tasks, args.seed, args.workers, compute.rank, compute.world_size)

    # -------------------------------------------------------------------------
    # resume

    seconds, resumed = 0.0, None
    if args.resume == "auto":
        resumed = load_checkpoint_together(folder / "checkpoints", compute)
    if resumed:
        done, saved = resumed
        with untrusted(f"checkpoint in {folder}"):
            check_same_flags(saved["flags"], args, MAY_CHANGE, folder)
            trainer.ppo.load_state_dict(saved["ppo"])
            seconds = float(saved["seconds"])
        print0(f"resumed at update {done} from {folder / 'checkpoints'}")
    begun = trainer.ppo.updates
    log = RunLog(folder, {"flags": vars(args)}, compute, resume_step=begun if resumed else None)
    kept_flags = resumable_flags(args, MAY_CHANGE)

    # -------------------------------------------------------------------------
    # loop

    watch = Stopwatch(args.updates, done=begun)
    state = lambda: {"flags": kept_flags, "ppo": trainer.ppo.state_dict(), "seconds": seconds}
    saving = CheckpointWriter(folder / "checkpoints") if compute.is_main else contextlib.nullcontext()
    with saving as writer:
        while trainer.ppo.updates < args.updates and not stop.requested():
            if args.stop_after and trainer.ppo.updates >= args.stop_after:
                break
            record = trainer.update()
            seconds += record["core_seconds"]
            log.log(step=record.pop("update"), **record)
            print_update(record, trainer.ppo.updates, args.updates, watch.tick(trainer.ppo.updates))
            if writer and trainer.ppo.updates % args.save_every == 0:
                writer.save(trainer.ppo.updates, state())
        trainer.close()
        done = trainer.ppo.updates
        if writer and done < args.updates and done > begun:
            writer.save(done, state())

    # -------------------------------------------------------------------------
    # done, or stopped: the averaged actor so far is a policy too

    episodes = done * args.groups * args.episodes
    card = {
        "flags": kept_flags,
        "updates_done": done,
        "episodes": episodes,
        "core_seconds": seconds,
        "tasks": [t.spec for t in tasks],
        "held_out_kinds": list(HELD_OUT),
        "environment": environment_record(compute),
    }
    if compute.is_main:
        save_lhopt_policy(trainer.ppo.averaged, folder / "policy", card, decisions=args.decisions)
    compute.barrier()  # when one rank leaves, torchrun ends the others
    if done < args.updates:
        print0(f"stopped after update {done}; the same command goes on")
        return REQUEUE_EXIT_CODE
    log.finish(flags=kept_flags, updates=done, episodes=episodes, core_seconds=seconds)
    print0(f"done: {episodes} episodes, {format_seconds(seconds)} of one core; {folder / 'policy.safetensors'}")
    return 0


def print_update(record: dict, done: int, updates: int, left: float | None) -> None:
    kinds = " ".join(f"{kind} {score:+.2f}" for kind, score in record["kinds"].items())
    print0(
        f"update {done:04d}/{updates:04d} | score {record['score']:+.3f} | value explains {record['explained']:.2f} | "
        f"entropy {record['entropy']:.2f} | kl {record['kl']:.3f} | {kinds} | "
        f"episodes/s {record['episodes'] / record['seconds']:.1f} | left {format_seconds(left)}"
    )


if __name__ == "__main__":
    run_main(main, JelError)
