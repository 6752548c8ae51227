"""Meta-train the controller: groups of short training episodes, a policy update after each (paper 3.5, 4.1, Table 2).

    python -m scripts.meta_train                                         paper size on a GPU, tiny on a CPU
    torchrun --standalone --nproc_per_node 8 -m scripts.meta_train       the same policy from 8 GPUs, 1 episode each
    python -m scripts.meta_train --preset tiny --updates 10 --advantages standard     an ablation (paper 4.4)

Writes $NANOCHAT_BASE_DIR/runs/<tag>/: config.json, log.jsonl, checkpoints/, policy.safetensors, policy.json,
result.json.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from functools import partial

import torch

from jel.errors import JelError
from jel.features import FEATURES, WATCHED
from jel.learn.advantages import RETURNS
from jel.learn.env import decision_steps
from jel.learn.exploration import Exploration
from jel.learn.meta import MetaTrainer
from jel.learn.rollout import Interrupted, RewardConfig
from jel.learn.search import SEARCHES, SearchTrainer
from jel.learn.workers import ParallelTask
from jel.policy import save_policy
from jel.recipes.jel import ADVANTAGES, JelRecipe
from jel.tasks.base import Task
from jel.tasks.pretrain import (
    CORRECTIONS,
    PretrainTask,
    episode_bytes,
    episode_flops,
    free_bytes,
    group_names,
    tuned_base,
    uniform_base,
)
from nanochat.checkpoint import CheckpointWriter, load_checkpoint_together, untrusted
from nanochat.common import Compute, UserError, derive_seed, init_compute, print0, run_main, seed_everything
from nanochat.dataset import corpus_record, resolve_data
from nanochat.gpt import GPTConfig
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import RunLog, Stopwatch, environment_record, format_seconds
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts.hparams import HPARAM_NAMES, add_hparam_flags, add_model_flags, tuned_settings
from scripts.lhopt import train as lhopt
from scripts.presets import RECIPES, add_preset_flag, parse_with_preset
from scripts.runs import (
    LARGEST,
    check_model,
    check_numbers,
    check_same_flags,
    hold,
    is_finished,
    resumable_flags,
    run_folder,
)

# -----------------------------------------------------------------------------
# flags (a default here is the paper's; presets list what they change)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_preset_flag(parser)
    flag(
        "--recipe",
        choices=list(RECIPES),
        default="jel",
        help="paper: Table 2; jel: per-group control, see docs/design.md; lhopt: a program of its own, docs/lhopt.md",
    )
    flag("--method", choices=["jel", *SEARCHES], default="jel", help="jel: learn; others: search for constants instead")
    add_model_flags(parser)
    # an episode
    flag("--num-iterations", type=int, default=561, help="steps of an episode")
    flag("--episode-seq-len", type=int, default=128)
    flag("--episode-batch-size", type=int, default=32, help="rows per step and episode")
    flag("--decision-interval", type=int, default=50, help="steps")
    # the base that multipliers act on: that of the run they are for
    add_hparam_flags(parser, "uniform")
    flag(
        "--episode-starts",
        choices=["shared", "own"],
        default="shared",
        help="initialisation and data: one per group, or one per episode",
    )
    # reward
    flag("--probe-batches", type=int, default=4, help="fixed batches whose mean loss is the reward's")
    flag("--gradient-penalty", type=float, default=0.0, help="lambda_g")
    flag("--smoothness-penalty", type=float, default=0.0, help="lambda_s")
    flag("--nan-penalty", type=float, help="what an episode that blows up loses; default: its starting loss")
    # policy and its update
    what = "what the policy observes, see jel/features.py"
    flag("--features", nargs="+", choices=[*FEATURES, *WATCHED], default=["progress"], metavar="NAME", help=what)
    flag("--policy-hidden", type=int, default=64)
    flag("--initial-log-std", type=float, default=-0.5)
    flag("--action-range", type=float, default=100.0, help="multipliers lie in [1 / this, this]")
    flag("--corrections", choices=["none", "groups"], default="none", help="groups: corrections of the learning rate")
    flag("--correction-range", type=float, default=10.0, help="corrections lie in [1 / this, this]")
    flag("--noise-correlation", type=float, default=0.0, help="of the exploration noise from decision to decision")
    flag("--antithetic", type=int, choices=[0, 1], default=0, help="1: episodes in pairs of opposite noise")
    flag("--updates", type=int, default=50)
    flag("--episodes", type=int, default=8, help="per update, over all ranks")
    flag("--episode-chunk", type=int, default=-1, help="episodes side by side on a device; -1 = as many as fit")
    flag(
        "--episode-workers",
        type=int,
        default=-1,
        help="processes that share them on a CPU, a thread each; 1 = this one, with all threads; -1 = one a core",
    )
    flag("--policy-lr", type=float, default=3e-4)
    flag("--policy-lr-schedule", choices=["constant", "linear"], default="constant", help="linear: to 0 at the end")
    flag("--returns", choices=list(RETURNS), default="reward-to-go", help="total: one for all decisions of an episode")
    flag("--gamma", type=float, default=0.99)
    flag("--clip", type=float, default=0.2)
    flag("--ppo-epochs", type=int, default=4)
    flag("--minibatch-size", type=int, default=64)
    flag("--entropy-coef", type=float, default=0.0)
    flag(
        "--advantages",
        choices=list(ADVANTAGES),
        default="group",
        help="standard: with GRPO's length and variance normalisation (paper 4.4)",
    )
    # saving, logging
    flag("--save-every", type=int, default=1, help="updates between checkpoints")
    flag(
        "--resume",
        choices=["none", "auto"],
        default="none",
        help="auto: go on from the newest whole checkpoint of this run, if any",
    )
    flag("--run", default="dummy", help="wandb run name; dummy = off")
    flag("--model-tag", default="meta", help="name of the run's folder")
    flag("--device-type", default="", help="cuda or cpu; default: cuda if present")
    flag("--seed", type=int, default=42)
    return parser


SEEDS = {
    "policy": "policy",
    "shuffle": "minibatches",
    "action": "actions",
}  # of the trainer: the names they derive from
# what may differ when a run goes on
MAY_CHANGE = set("resume run model_tag save_every device_type episode_chunk episode_workers".split())


def main() -> int:
    args = parse_with_preset(flags(), "meta_train")
    check_flags(args)

    # -------------------------------------------------------------------------
    # init

    compute = init_compute(args.device_type)
    seed_everything(derive_seed(args.seed, "meta"))
    stop = StopRequest(compute)
    folder = run_folder(args.model_tag)
    _lock = hold(folder, compute, wait=args.resume == "auto")  # open until this process ends
    if is_finished(folder, args, MAY_CHANGE):
        print0(f"already finished: {folder}")
        return 0
    tokenizer = Tokenizer.load(tokenizer_folder(args.tokenizer))
    data = resolve_data(args.data)
    cache = TokenCache.build(data, tokenizer, compute)

    # -------------------------------------------------------------------------
    # the episodes

    config = GPTConfig.from_depth(
        args.depth,
        args.aspect_ratio,
        args.head_dim,
        sequence_len=args.episode_seq_len,
        vocab_size=tokenizer.vocab_size,
        window_pattern=args.window_pattern,
    )
    task, chunk, workers = make_episodes(args, config, cache, compute)

    # -------------------------------------------------------------------------
    # the policy and how it is found

    recipe = make_recipe(args)
    where = {"rank": compute.rank, "world_size": compute.world_size, "stop_requested": stop.requested}
    trainer: MetaTrainer | SearchTrainer
    if args.method == "jel":
        seeds = {f"{name}_seed": derive_seed(args.seed, names) for name, names in SEEDS.items()}
        trainer = recipe.trainer(task, chunk=chunk, **seeds, **where)
    else:
        trainer = recipe.searcher(args.method, task, derive_seed(args.seed, "search"), chunk, **where)

    # -------------------------------------------------------------------------
    # resume

    seconds, records, resumed = 0.0, [], None
    if args.resume == "auto":
        resumed = load_checkpoint_together(folder / "checkpoints", compute)
    if resumed:
        done, saved = resumed
        with untrusted(f"checkpoint in {folder}"):
            check_same_flags(saved["flags"], args, MAY_CHANGE, folder)
            trainer.load_state_dict(saved["trainer"])
            seconds = float(saved["seconds"])
            records = [{key: float(record[key]) for key in ("entropy", "return_mean")} for record in saved["records"]]
        print0(f"resumed at update {done} from {folder / 'checkpoints'}")
    writer = CheckpointWriter(folder / "checkpoints") if compute.is_main else None

    def save() -> None:
        if writer:
            writer.save(
                trainer.updates,
                {
                    "flags": resumable_flags(args, MAY_CHANGE),
                    "trainer": trainer.state_dict(),
                    "seconds": seconds,
                    "records": records,
                },
            )

    log = RunLog(
        folder,
        {"flags": vars(args), "model": vars(config), "data": corpus_record(data), "tokenizer": tokenizer.fingerprint},
        compute,
        resume_step=trainer.updates if resumed else None,
        wandb_name=args.run,
    )

    # -------------------------------------------------------------------------
    # loop

    watch = Stopwatch(args.updates, done=trainer.updates)
    while trainer.updates < args.updates:
        t0 = time.perf_counter()
        try:
            record = trainer.update()
        except Interrupted:
            break
        seconds += time.perf_counter() - t0
        records.append({key: math.nan if record[key] is None else record[key] for key in ("entropy", "return_mean")})
        log.log(**record)
        print_update(record, trainer.updates, args, watch.tick(trainer.updates))
        if record["episodes_alive"] < args.episodes:
            print0(f"  {args.episodes - record['episodes_alive']} of {args.episodes} episodes blew up")
        if trainer.updates % args.save_every == 0 and trainer.updates < args.updates:
            save()
    task.close()
    if trainer.updates < args.updates:
        save()
        if writer:
            writer.close()
        compute.barrier()  # when one rank leaves, torchrun ends the others
        print0(f"stopped after update {trainer.updates}; run the same command with --resume auto to go on")
        return REQUEUE_EXIT_CODE

    # -------------------------------------------------------------------------
    # done

    if writer:
        writer.close()
        episodes = args.updates * args.episodes
        probes = args.probe_batches * (1 + len(decision_steps(args.num_iterations, args.decision_interval)))
        tokens = args.episode_batch_size * args.episode_seq_len
        save_policy(
            trainer.policy,
            folder / "policy",
            {
                "flags": resumable_flags(args, MAY_CHANGE),
                "model": vars(config),
                "environment": environment_record(compute),
                "seconds": seconds,
            },
        )
        log.finish(
            updates=args.updates,
            episodes=episodes,
            tokens=episodes * args.num_iterations * tokens,
            probe_tokens=episodes * probes * tokens,
            flops=episodes * episode_flops(config, args.num_iterations * tokens, probes * tokens),
            seconds=seconds,
            core_seconds=seconds * compute.world_size * cores(workers, compute),
            entropy=[r["entropy"] for r in records],
            return_mean=[r["return_mean"] for r in records],
            policy=str(folder / "policy.safetensors"),
            flags=resumable_flags(args, MAY_CHANGE),
        )
    compute.barrier()  # gloo aborts in a rank that tears down after another has gone
    print0(f"done: {args.updates} updates in {format_seconds(seconds)}; policy in {folder / 'policy.safetensors'}")
    return 0


# -----------------------------------------------------------------------------
# what main assembles


def make_episodes(
    args: argparse.Namespace, config: GPTConfig, cache: TokenCache, compute: Compute
) -> tuple[Task, int, int]:
    """(task, episodes side by side on this rank, processes that share them)."""
    schedule = {
        "warmup_ratio": args.warmup_ratio,
        "warmdown_ratio": args.warmdown_ratio,
        "final_lr_frac": args.final_lr_frac,
        "final_wd_frac": 0.0,
    }
    share = -(-args.episodes // compute.world_size)
    each, free = episode_bytes(config, args.episode_batch_size), least_over_ranks(free_bytes(compute.device), compute)
    chunk = args.episode_chunk if args.episode_chunk > 0 else max(1, min(share, int(0.8 * free / each)))
    workers = min(chunk, workers_for(args.episode_workers, compute))
    print0(
        f"episodes: {args.episodes} a group, {share} a rank, {chunk} side by side in "
        f"{workers} process{'es' * (workers > 1)} (about {each / 2**20:,.0f} MiB each, {free / 2**20:,.0f} MiB free)"
    )
    if args.hparams == "uniform":
        make_base = partial(uniform_base, lr=args.base_lr, weight_decay=args.base_wd)
    else:
        make_base = partial(tuned_base, **tuned_settings(args))
    make_task = partial(
        PretrainTask,
        config,
        cache,
        compute,
        num_steps=args.num_iterations,
        batch_size=args.episode_batch_size,
        probe_batches=args.probe_batches,
        make_optimizer=make_base,
        schedule=schedule,
        seed=args.seed,
        shared=args.episode_starts == "shared",
    )
    if workers == 1:
        task = make_task()
    else:
        task = ParallelTask(make_task, workers, group_names(config), partial(same_length, args.num_iterations))
    return task, chunk, workers


def make_recipe(args: argparse.Namespace) -> JelRecipe:
    """The recipe that the flags describe."""
    same = (
        "action_range correction_range initial_log_std policy_lr policy_lr_schedule updates gamma clip minibatch_size "
        "entropy_coef returns advantages episodes decision_interval"
    )
    return JelRecipe(
        **{name: getattr(args, name) for name in same.split()},
        corrections=CORRECTIONS if args.corrections == "groups" else {},
        features=tuple(args.features),
        hidden=args.policy_hidden,
        epochs=args.ppo_epochs,
        exploration=Exploration(args.noise_correlation, bool(args.antithetic)),
        reward=RewardConfig(args.gradient_penalty, args.smoothness_penalty, args.nan_penalty),
    )


AT_LEAST_ONE = (
    "num_iterations episode_seq_len episode_batch_size decision_interval probe_batches updates episodes ppo_epochs "
    "minibatch_size policy_hidden save_every"
).split()
NOT_NEGATIVE = [
    *HPARAM_NAMES,
    *"final_lr_frac gradient_penalty smoothness_penalty nan_penalty policy_lr clip entropy_coef".split(),
]


def check_flags(args: argparse.Namespace) -> None:
    """Raise `UserError` for a number with which nothing can be learned."""
    check_model(args)
    check_numbers(
        args,
        {
            (1, LARGEST): AT_LEAST_ONE,
            (0, LARGEST): NOT_NEGATIVE,
            (0, 1): ["warmup_ratio", "warmdown_ratio", "gamma", "noise_correlation"],
        },
    )
    if args.decision_interval > args.num_iterations:
        print0(
            f"warning: a decision every {args.decision_interval} steps is more than the episode's "
            f"{args.num_iterations}: one decision an episode"
        )


def workers_for(given: int, compute: Compute) -> int:
    """How many processes train episodes on this rank. Raises `UserError` for what the device cannot do."""
    if given < 1 and given != -1:
        raise UserError(f"--episode-workers is {given}; give 1 or more, or -1 to choose it here")
    if given > 1 and compute.is_cuda:
        raise UserError(
            f"--episode-workers {given} is for a CPU; on a GPU the episodes are one program, and torchrun uses several"
        )
    return 1 if compute.is_cuda else given if given > 0 else max(1, os.cpu_count() // compute.world_size)


def print_update(record: dict, done: int, args: argparse.Namespace, left: float | None) -> None:
    """One line an update; a policy that observes more than progress has no multipliers to show beforehand."""
    shown = ""
    if everywhere := record["multipliers"].get("*"):
        lr, wd = everywhere["lr"], everywhere["weight_decay"]
        ends = [f"{x[0]:.3g}/{x[len(x) // 2]:.3g}/{x[-1]:.3g}" for x in (lr, wd)]
        shown = f"lr x{ends[0]} wd x{ends[1]} | "
        own = {g: m["lr"][0] for g, m in record["multipliers"].items() if g != "*"}
        shown += "".join(f"{g} x{m:.3g} " for g, m in own.items()) + ("| " if own else "")
    mean, best = (math.nan if record[key] is None else record[key] for key in ("return_mean", "return_best"))
    print0(
        f"update {done:03d}/{args.updates:03d} | return {mean:.4f} best {best:.4f} | entropy {record['entropy']:.3f} | "
        f"{shown}episodes/s {args.episodes / record['seconds']:.3g} | left {format_seconds(left)}"
    )


def same_length(num_steps: int, group: int) -> int:
    """Every group's episodes have this length: `ParallelTask` asks a function."""
    return num_steps


def cores(workers: int, compute: Compute) -> int:
    """The cores that a rank's episodes keep busy, or its one GPU."""
    return 1 if compute.is_cuda else workers if workers > 1 else torch.get_num_threads()


def least_over_ranks(value: int, compute: Compute) -> int:
    least = torch.tensor(value, device=compute.device)
    if compute.world_size > 1:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


if __name__ == "__main__":
    run_main(lhopt.main if lhopt.asked_for(sys.argv[1:]) else main, JelError)
