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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from jel.errors import JelError
from jel.learn.env import decision_steps
from jel.learn.exploration import Exploration
from jel.learn.meta import MetaTrainer
from jel.learn.rollout import Interrupted, RewardConfig
from jel.learn.search import SearchTrainer
from jel.learn.shared_results import SharedResults
from jel.learn.workers import ParallelTask
from jel.policy import save_policy
from jel.recipes.jel import JelRecipe
from jel.tasks.base import Task
from jel.tasks.pretrain import (
    CORRECTIONS,
    PretrainTask,
    contract_of,
    episode_bytes,
    episode_flops,
    group_names,
    tuned_base,
    uniform_base,
)
from nanochat.checkpoint import CheckpointWriter, load_checkpoint_together, untrusted
from nanochat.common import (
    Compute,
    UserError,
    derive_seed,
    init_compute,
    least_over_ranks,
    print0,
    run_main,
    seed_everything,
)
from nanochat.dataset import corpus_record, resolve_data
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import free_bytes
from nanochat.optim import MuonAdamW
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import RunLog, Stopwatch, environment_record, format_seconds, without_compilation
from nanochat.token_cache import TokenCache, epochs_line
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts.hparams import tuned_settings
from scripts.lhopt import train as lhopt
from scripts.meta_flags import check_flags, flags
from scripts.presets import parse_with_preset
from scripts.runs import (
    check_same_flags,
    hold,
    is_finished,
    resumable_flags,
    run_folder,
)

SEEDS = {
    "policy": "policy",
    "shuffle": "minibatches",
    "action": "actions",
}  # of the trainer: the names they derive from
# what may differ when a run goes on
MAY_CHANGE = set("resume run model_tag save_every device_type episode_chunk episode_workers cuda_graphs".split())


def main() -> int:
    args = parse_with_preset(flags(__doc__), "meta_train")
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
    tokens_of_all = args.updates * args.num_iterations * args.episode_batch_size * args.episode_seq_len  # if shared
    if line := epochs_line(cache, tokens_of_all):
        print0(line)

    # -------------------------------------------------------------------------
    # the policy and how it is found

    recipe = make_recipe(args)
    where = {"rank": compute.rank, "world_size": compute.world_size, "stop_requested": stop.requested}
    trainer: MetaTrainer | SearchTrainer
    if args.method == "jel":
        seeds = {f"{name}_seed": derive_seed(args.seed, names) for name, names in SEEDS.items()}
        trainer = recipe.trainer(task, chunk=chunk, **seeds, **where)
    else:
        shared = SharedResults(Path(args.shared_search), recipe.knobs(), args.seed) if args.shared_search else None
        trainer = recipe.searcher(args.method, task, derive_seed(args.seed, "search"), chunk, shared=shared, **where)

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

    watch, before, taken = Stopwatch(trainer.planned, done=trainer.updates), seconds, []
    while trainer.updates < trainer.planned:
        t0 = time.perf_counter()
        try:
            record = trainer.update()
        except Interrupted:
            break
        taken.append(time.perf_counter() - t0)
        seconds = before + without_compilation(taken, compiles=compute.is_cuda)
        records.append({key: math.nan if record[key] is None else record[key] for key in ("entropy", "return_mean")})
        log.log(**record)
        watch.total = trainer.planned  # fewer once a learning stands still
        print_update(record, trainer, args, watch.tick(trainer.updates))
        if record["episodes_alive"] < args.episodes:
            print0(f"  {args.episodes - record['episodes_alive']} of {args.episodes} episodes blew up")
        if trainer.updates % args.save_every == 0 and trainer.updates < trainer.planned:
            save()
    task.close()
    if trainer.updates < trainer.planned:
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
        episodes = trainer.updates * args.episodes
        readings = 1 + len(decision_steps(args.num_iterations, args.decision_interval))
        steps, readings = episodes * args.num_iterations, episodes * readings
        if isinstance(trainer, SearchTrainer):
            steps, readings = trainer.trained()  # a search may have stopped candidates early
        tokens = args.episode_batch_size * args.episode_seq_len
        # an episode is too short to feel weight decay: a policy that leaves it alone has base_train carry it
        carried = args.hparams == "uniform" and args.decay_range == 1
        save_policy(
            trainer.policy,
            folder / "policy",
            {
                "flags": resumable_flags(args, MAY_CHANGE),
                "model": vars(config),
                "contract": contract_of(config, base_of(args), args.num_iterations, schedule_name(args)).to_json(),
                "decay_carry": args.num_iterations * tokens if carried else 0,
                "environment": environment_record(compute),
                "seconds": seconds,
            },
        )
        log.finish(
            updates=trainer.updates,
            episodes=episodes,
            tokens=steps * tokens,
            probe_tokens=readings * args.probe_batches * tokens,
            flops=episode_flops(config, steps * tokens, readings * args.probe_batches * tokens),
            seconds=seconds,
            core_seconds=seconds * compute.world_size * cores(workers, compute),
            entropy=[r["entropy"] for r in records],
            return_mean=[r["return_mean"] for r in records],
            policy=str(folder / "policy.safetensors"),
            flags=resumable_flags(args, MAY_CHANGE),
        )
    compute.barrier()  # gloo aborts in a rank that tears down after another has gone
    print0(f"done: {trainer.updates} updates in {format_seconds(seconds)}; policy in {folder / 'policy.safetensors'}")
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
    make_task = partial(
        PretrainTask,
        config,
        cache,
        compute,
        num_steps=args.num_iterations,
        batch_size=args.episode_batch_size,
        probe_batches=args.probe_batches,
        make_optimizer=base_of(args),
        schedule=schedule,
        seed=args.seed,
        shared=args.episode_starts == "shared",
        cuda_graphs=args.cuda_graphs,
    )
    if args.cuda_graphs and not compute.is_cuda:
        print0("--cuda-graphs: a CPU has none, the steps are what they are without")
    if workers == 1:
        task = make_task()
    else:
        task = ParallelTask(make_task, workers, group_names(config), partial(same_length, args.num_iterations))
    return task, chunk, workers


def base_of(args: argparse.Namespace) -> Callable[[GPT], MuonAdamW]:
    """What makes the optimizer that multipliers act on."""
    if args.hparams == "uniform":
        return partial(uniform_base, lr=args.base_lr, weight_decay=args.base_wd)
    return partial(tuned_base, **tuned_settings(args))


def schedule_name(args: argparse.Namespace) -> str:
    parts = f"warm-up {args.warmup_ratio:g}", f"warm-down {args.warmdown_ratio:g} to {args.final_lr_frac:g}"
    return f"{', '.join(parts)}; weight decay to 0"


def make_recipe(args: argparse.Namespace) -> JelRecipe:
    """The recipe that the flags describe."""
    same = (
        "action_range decay_range correction_range momentum_range initial_log_std episodes decision_interval updates "
        "compare learnings learner policy_lr policy_lr_schedule returns advantages gamma clip minibatch_size "
        "entropy_coef still final_log_std policy_steps trust_region pessimism variation_cost departure_cost"
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


def workers_for(given: int, compute: Compute) -> int:
    """How many processes train episodes on this rank. Raises `UserError` for what the device cannot do."""
    if given < 1 and given != -1:
        raise UserError(f"--episode-workers is {given}; give 1 or more, or -1 to choose it here")
    if given > 1 and compute.is_cuda:
        raise UserError(
            f"--episode-workers {given} is for a CPU; on a GPU the episodes are one program, and torchrun uses several"
        )
    return 1 if compute.is_cuda else given if given > 0 else max(1, os.cpu_count() // compute.world_size)


def print_update(
    record: dict, trainer: MetaTrainer | SearchTrainer, args: argparse.Namespace, left: float | None
) -> None:
    """One line an update; a policy that observes more than progress has no multipliers to show beforehand."""
    shown = ""
    if everywhere := record["multipliers"].get("*"):
        names = {"weight_decay": "wd"}
        for key, x in everywhere.items():
            shown += f"{names.get(key, key)} x{x[0]:.3g}/{x[len(x) // 2]:.3g}/{x[-1]:.3g} "
        shown += "| "
        own = {g: m["lr"][0] for g, m in record["multipliers"].items() if g != "*"}
        shown += "".join(f"{g} x{m:.3g} " for g, m in own.items()) + ("| " if own else "")
    mean, best = (math.nan if record[key] is None else record[key] for key in ("return_mean", "return_best"))
    print0(
        f"update {trainer.updates:03d}/{trainer.planned:03d} | return {mean:.4f} best {best:.4f} | "
        f"entropy {record['entropy']:.3f} | {shown}episodes/s {args.episodes / record['seconds']:.3g} | "
        f"left {format_seconds(left)}"
    )


def same_length(num_steps: int, group: int) -> int:
    """Every group's episodes have this length: `ParallelTask` asks a function."""
    return num_steps


def cores(workers: int, compute: Compute) -> int:
    """The cores that a rank's episodes keep busy, or its one GPU."""
    return 1 if compute.is_cuda else workers if workers > 1 else torch.get_num_threads()


if __name__ == "__main__":
    run_main(lhopt.main if lhopt.asked_for(sys.argv[1:]) else main, JelError)
