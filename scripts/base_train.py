"""Train a language model, with or without a controller on its learning rates and weight decay.

    python -m scripts.base_train                                       paper size on a GPU, tiny on a CPU
    python -m scripts.base_train --hparams uniform --controller jel    the paper's JEL run with the shipped policy
    torchrun --standalone --nproc_per_node 8 -m scripts.base_train     the same run on 8 GPUs
    python -m scripts.base_train --controller my_module:MyController   a controller of your own (see jel/controller.py)

Writes $NANOCHAT_BASE_DIR/runs/<tag>/: config.json, log.jsonl, checkpoints/, model.safetensors, result.json.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from pathlib import Path

import torch

from jel import IDENTITY, Controller, JelError, apply_multipliers, load_controller, validate_multipliers
from nanochat.checkpoint import (
    CheckpointWriter,
    check_tensors,
    load_checkpoint_together,
    rng_state,
    set_rng_state,
    untrusted,
)
from nanochat.common import Compute, UserError, derive_seed, init_compute, print0, run_main, seed_everything
from nanochat.dataloader import DataLoader, fixed_batches
from nanochat.dataset import corpus_record, resolve_data
from nanochat.divergence_guard import REACH, DivergenceGuard
from nanochat.engine import generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.lr_schedule import base_hparams
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import RunLog, Stopwatch, format_seconds
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from nanochat.weights import save_weights
from scripts.presets import add_preset_flag, parse_with_preset
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
    # model
    flag("--depth", type=int, default=6, help="layers; width and heads follow from it")
    flag("--aspect-ratio", type=int, default=64, help="width = depth x this, rounded up to a multiple of --head-dim")
    flag("--head-dim", type=int, default=128)
    flag("--max-seq-len", type=int, default=2048)
    flag(
        "--window-pattern",
        default="SSSL",
        help="per layer, tiled: S sees half the context, L all of it; the last layer is always L",
    )
    # data
    flag("--data", default="fineweb-edu", help="fineweb-edu, embedded, or a folder of .parquet, .jsonl or .txt")
    flag("--tokenizer", default="default", help="name of a tokenizer trained by scripts.tok_train")
    # length and batch
    flag("--num-iterations", type=int, default=-1, help="optimizer steps; -1 = from --target-param-data-ratio")
    flag("--target-param-data-ratio", type=float, default=4.0, help="training tokens per parameter")
    flag("--device-batch-size", type=int, default=32, help="rows per micro-batch and rank")
    flag(
        "--total-batch-size",
        type=int,
        default=524288,
        help="tokens per optimizer step, over all ranks and micro-batches",
    )
    # hyperparameters
    flag(
        "--hparams",
        choices=["hand-tuned", "uniform"],
        default="hand-tuned",
        help="per-group rates, or one for all (--base-lr, --base-wd)",
    )
    flag("--embedding-lr", type=float, default=0.3)
    flag("--unembedding-lr", type=float, default=0.004)
    flag("--matrix-lr", type=float, default=0.02)
    flag("--scalar-lr", type=float, default=0.5)
    flag("--weight-decay", type=float, default=0.2, help="Muon's, at depth 12; scaled by (12 / depth)^2")
    flag("--adam-beta1", type=float, default=0.8)
    flag("--adam-beta2", type=float, default=0.95)
    flag(
        "--lr-batch-rule",
        choices=["sqrt", "none"],
        default="sqrt",
        help="hand-tuned rates x sqrt(batch tokens / 2^19), or as they are",
    )
    flag("--base-lr", type=float, default=1e-3, help="--hparams uniform: every group's rate")
    flag("--base-wd", type=float, default=1e-2, help="--hparams uniform: every group's weight decay")
    flag("--warmup-ratio", type=float, default=0.0)
    flag("--warmdown-ratio", type=float, default=0.4)
    flag("--final-lr-frac", type=float, default=0.0)
    # method
    flag("--optimizer", choices=["muon-adamw", "schedule-free"], default="muon-adamw")
    flag("--sf-lr", type=float, default=2.0)
    flag("--sf-wd", type=float, default=0.0)
    flag("--sf-warmup", type=int, default=0, help="steps")
    flag("--sf-beta1", type=float, default=0.9)
    flag("--sf-beta2", type=float, default=0.999)
    flag(
        "--sf-muon-schedule",
        choices=["constant", "warmdown"],
        default="constant",
        help="of Muon's rate and decay in a schedule-free run; warmdown: the base schedule, as in the other runs",
    )
    flag("--controller", default="none", help="none, jel, schedule, or PYTHON.PATH:Class")
    flag("--policy", help="the controller's policy (or schedule) file; default: the policy shipped with the package")
    flag("--decision-interval", type=int, default=50, help="steps between the controller's decisions")
    # evaluation, saving, logging
    flag("--eval-every", type=int, default=50, help="steps between validations; 0 = only at the end")
    flag("--eval-tokens", type=int, default=20 * 524288)
    flag("--sample-tokens", type=int, default=64, help="tokens of sample text at the end; 0 = none")
    flag("--save-every", type=int, default=100, help="steps between checkpoints; 0 = none")
    flag(
        "--max-recoveries",
        type=int,
        default=8,
        help="divergences to mend (skip a bad batch, or go back and cut the rates) before giving up; 0 = off",
    )
    flag(
        "--resume",
        choices=["none", "auto"],
        default="none",
        help="none, or auto: go on from the newest whole checkpoint of this run, if there is one",
    )
    flag("--run", default="dummy", help="wandb run name; dummy = off")
    flag("--model-tag", default="", help="name of the run's folder; default d<depth>")
    flag("--device-type", default="", help="cuda or cpu; default: cuda if present")
    flag("--seed", type=int, default=42)
    return parser


MAY_CHANGE = {"resume", "run", "model_tag", "device_batch_size", "save_every", "device_type", "sample_tokens"}


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Controller | None]:
    """The flags over the preset's defaults, and the controller they name."""
    args = parse_with_preset(flags(), "base_train", argv)
    controller = load_controller(args.controller, args.policy)
    args.policy_digest = getattr(
        controller, "digest", None
    )  # a policy trained anew under the same name makes another run
    return args, controller


def main() -> int:
    args, controller = parse()
    check_flags(args)

    # -------------------------------------------------------------------------
    # init

    compute = init_compute(args.device_type)
    seed_everything(derive_seed(args.seed, "init"))
    stop = StopRequest(compute)
    folder = run_folder(args.model_tag or f"d{args.depth}")
    lock = hold(folder, compute, wait=args.resume == "auto")  # until this process ends
    if is_finished(folder, args, MAY_CHANGE):
        print0(f"already finished: {folder}")
        return 0
    tokenizer = Tokenizer.load(tokenizer_folder(args.tokenizer))
    data = resolve_data(args.data)
    cache = TokenCache.build(data, tokenizer, compute)

    # -------------------------------------------------------------------------
    # model

    config = GPTConfig.from_depth(
        args.depth,
        args.aspect_ratio,
        args.head_dim,
        sequence_len=args.max_seq_len,
        vocab_size=tokenizer.vocab_size,
        window_pattern=args.window_pattern,
    )
    with torch.device("meta"):
        plain_model = GPT(config)
    plain_model.to_empty(device=compute.device)
    plain_model.init_weights()
    model = plain_model.prepare()
    print0(plain_model.kernels)
    n_params = plain_model.num_params()
    print0(
        f"model: depth {config.n_layer}, width {config.n_embd} = {args.depth} x {args.aspect_ratio} rounded to heads of {args.head_dim}, "
        f"vocabulary {config.vocab_size}, {n_params:,} parameters"
    )

    # -------------------------------------------------------------------------
    # length and batch

    tokens_per_micro_step = args.device_batch_size * args.max_seq_len * compute.world_size
    check_batch(args, tokens_per_micro_step)
    accumulation = args.total_batch_size // tokens_per_micro_step
    num_iterations = args.num_iterations
    if num_iterations == -1:
        num_iterations = max(1, round(args.target_param_data_ratio * n_params / args.total_batch_size))
    print0(
        f"length: {num_iterations} steps x {args.total_batch_size:,} tokens (= {accumulation} micro-batches x {tokens_per_micro_step:,}) "
        f"= {num_iterations * args.total_batch_size / n_params:.2f} tokens per parameter"
    )

    # -------------------------------------------------------------------------
    # optimizer

    batch_scale = math.sqrt(args.total_batch_size / 2**19) if args.lr_batch_rule == "sqrt" else 1.0
    weight_decay = args.weight_decay * (12 / args.depth) ** 2
    optimizer = plain_model.setup_optimizer(
        unembedding_lr=args.unembedding_lr * batch_scale,
        embedding_lr=args.embedding_lr * batch_scale,
        matrix_lr=args.matrix_lr * batch_scale,
        scalar_lr=args.scalar_lr * batch_scale,
        weight_decay=weight_decay,
        adam_betas=(args.adam_beta1, args.adam_beta2),
        rank=compute.rank,
        world_size=compute.world_size,
    )
    if args.hparams == "uniform":
        for group in optimizer.param_groups:
            group["initial_lr"], group["initial_wd"] = args.base_lr, args.base_wd
    schedule = {
        "warmup_ratio": args.warmup_ratio,
        "warmdown_ratio": args.warmdown_ratio,
        "final_lr_frac": args.final_lr_frac,
        "final_wd_frac": 0.0,
    }
    if args.optimizer == "schedule-free":
        if args.sf_muon_schedule == "constant":
            schedule = {"warmup_ratio": 0.0, "warmdown_ratio": 0.0, "final_lr_frac": 1.0, "final_wd_frac": 1.0}
        optimizer = ScheduleFreeMuon(
            optimizer.param_groups,
            args.sf_lr,
            args.sf_wd,
            args.sf_warmup,
            compute.rank,
            compute.world_size,
            betas=(args.sf_beta1, args.sf_beta2),
        )
        for group in optimizer.param_groups:  # the paper's Table 3: Muon at 0.02 / 0.2, nothing scheduled
            group["initial_lr"], group["initial_wd"] = args.matrix_lr, args.weight_decay
    groups = optimizer.param_groups
    for group in groups:
        print0(
            f"  {group['name']:>16} {group['kind']:>6}: {len(group['params'])} tensors, lr {group['initial_lr']:.4g}, weight decay {group['initial_wd']:.4g}"
        )

    # -------------------------------------------------------------------------
    # controller

    if controller and args.decision_interval > num_iterations:
        print0(
            f"warning: a decision every {args.decision_interval} steps is more than the run's {num_iterations}: "
            "the controller decides once, at the start"
        )
    multipliers = IDENTITY

    # -------------------------------------------------------------------------
    # data

    loader = DataLoader(
        cache,
        "train",
        args.device_batch_size,
        args.max_seq_len,
        compute.device,
        compute.rank,
        compute.world_size,
        rows_per_step=args.total_batch_size // args.max_seq_len,
    )
    eval_steps = max(1, args.eval_tokens // tokens_per_micro_step)
    eval_loader = DataLoader(
        cache, "val", args.device_batch_size, args.max_seq_len, compute.device, compute.rank, compute.world_size
    )
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=compute.device)
    probes = []
    if controller and "probe_loss" in controller.observes:
        probes = fixed_batches(cache, "probe", args.device_batch_size, args.max_seq_len, 4, compute.device)

    # -------------------------------------------------------------------------
    # evaluation

    @contextlib.contextmanager
    def evaluating():
        """Weights as they are to be evaluated: schedule-free keeps another version of them for training."""
        free = args.optimizer == "schedule-free"
        if free:
            optimizer.eval()
        with torch.no_grad(), compute.autocast():
            yield
        if free:
            optimizer.train()

    def validate() -> float:
        with evaluating():
            return bits_per_byte(
                model, (eval_loader.get(i) for i in range(eval_steps)), token_bytes, compute.world_size
            )

    def observe() -> dict[str, float]:
        """What the controller declared that it needs, and nothing else."""
        good_loss = guard.recent[-1] if skip and guard.recent else train_loss  # not that of a batch that is left out
        values = {
            "progress": lambda: step / num_iterations,
            "step": lambda: step,
            "train_loss": lambda: good_loss,
            "grad_norm": lambda: global_grad_norm(plain_model, compute),
            "probe_loss": probe_loss,
        }
        return {
            name: float(values[name]()) for name in sorted(controller.observes)
        }  # two are collective: one order on all ranks

    def loss_of(step: int) -> float:
        """Training loss of the batch of `step` under the present weights."""
        with torch.no_grad(), compute.autocast():
            losses = [model(*loader.get(step, micro_step)) for micro_step in range(accumulation)]
        return mean_over_ranks(sum(losses) / accumulation, compute)

    def probe_loss() -> float:
        with evaluating():  # the mean over ranks: GPUs may differ in the last bit, and ranks must not decide apart
            return mean_over_ranks(sum(model(x, y).double() for x, y in probes) / len(probes), compute)

    # -------------------------------------------------------------------------
    # resume

    def state() -> dict:
        """All that a run is, but for what its flags say; collective over ranks."""
        return {
            "flags": resumable_flags(args, MAY_CHANGE),
            "model": plain_model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "controller": controller.state_dict() if controller else {},
            "multipliers": multipliers,
            "smooth_loss": smooth_loss,
            "train_loss": train_loss,
            "seconds": seconds,
            "decision_seconds": decision_seconds,
            "guard": guard.state_dict(),
            "rng": rng_state(compute.device),
        }

    def restore(saved: dict) -> None:
        nonlocal multipliers, smooth_loss, train_loss, seconds, decision_seconds
        with untrusted(f"checkpoint in {folder}"):
            check_same_flags(saved["flags"], args, MAY_CHANGE, folder)
            check_tensors(plain_model.state_dict(), saved["model"], f"checkpoint in {folder}")
            plain_model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if controller:
                controller.load_state_dict(saved["controller"])
            multipliers = {
                name: {k: float(v) for k, v in factors.items()} for name, factors in saved["multipliers"].items()
            }
            validate_multipliers(multipliers, [group["name"] for group in groups])
            smooth_loss, train_loss, seconds = (float(saved[k]) for k in ("smooth_loss", "train_loss", "seconds"))
            decision_seconds = [float(s) for s in saved["decision_seconds"]]
            if not math.isfinite(seconds):
                raise ValueError(f"its seconds are {seconds}")
            set_rng_state(saved["rng"], compute.device)

    def save(step: int) -> None:
        everything = state()
        if writer and all(t.isfinite().all() for t in everything["model"].values()):  # broken weights are no way back
            writer.save(step, everything)

    step, smooth_loss, train_loss, seconds, decision_seconds = 0, math.nan, math.nan, 0.0, []
    keep = 2 + REACH // max(1, args.save_every)  # one of them older than any damage that has not shown yet
    writer = CheckpointWriter(folder / "checkpoints", keep) if compute.is_main else None
    guard = DivergenceGuard(args.max_recoveries)
    resumed = load_checkpoint_together(folder / "checkpoints", compute) if args.resume == "auto" else None
    if resumed:
        step, saved = resumed
        restore(saved)
        with untrusted(f"checkpoint in {folder}"):
            guard.load_state_dict(saved["guard"])
        print0(f"resumed at step {step} from {folder / 'checkpoints'}")
    elif args.save_every:
        save(0)  # so that there is always something to go back to

    log = RunLog(
        folder,
        {
            "flags": vars(args),
            "model": vars(config),
            "parameters": n_params,
            "data": corpus_record(data),
            "tokenizer": tokenizer.fingerprint,
            "num_iterations": num_iterations,
        },
        compute,
        resume_step=step if resumed else None,
        recoveries=guard.tries,
        wandb_name=args.run,
    )

    # -------------------------------------------------------------------------
    # loop

    flops_per_step = plain_model.flops_per_token() * args.total_batch_size
    watch = Stopwatch(num_iterations, done=step)
    while step < num_iterations:
        if args.eval_every and step % args.eval_every == 0:
            val_bpb = validate()
            print0(f"step {step:05d}/{num_iterations:05d} | val_bpb {val_bpb:.4f}")
            log.log(step=step, val_bpb=val_bpb)
        compute.synchronize()
        t0 = time.perf_counter()

        for micro_step in range(accumulation):
            inputs, targets = loader.get(step, micro_step)
            with compute.autocast():
                loss = model(inputs, targets)
            (loss / accumulation).backward()
            micro_loss = loss.detach() if micro_step == 0 else micro_loss + loss.detach()

        # NaN if a gradient is not finite, else 0: a broken gradient counts as a broken loss
        broken = 0.0 * torch.nn.utils.get_total_norm([p.grad for p in plain_model.parameters()])
        train_loss = mean_over_ranks(micro_loss / accumulation + broken, compute)
        skip = step in guard.skipped
        if not skip and guard.is_spike(train_loss):
            guard.count(step, train_loss)
            if guard.is_spike(loss_of(guard.witness(step))):  # the weights are damaged
                plain_model.zero_grad(set_to_none=True)
                back, saved = older_checkpoint(folder, guard.reach(step), writer, compute)
                line = guard.cut(step, train_loss, guard.limit(multipliers), saved["multipliers"] if back else {})
                step = back
                restore(saved)
                guard.rewind(saved["guard"])
                watch = Stopwatch(num_iterations, done=step)
                log.rewind(step)
                log.log(step=step, event=line, recovery=guard.tries)
                print0(f"{line}; back to step {step}")
                continue
            line, skip = guard.skip(step, train_loss), True
            log.log(step=step, event=line, recovery=guard.tries)
            print0(line)

        t_hook = time.perf_counter()
        # ---- the hook: base schedule, controller, param groups ----
        base = base_hparams(groups, step, num_iterations, **schedule)
        if controller and step % args.decision_interval == 0:
            multipliers = controller.decide(observe())
            decision_seconds.append(time.perf_counter() - t_hook)
        apply_multipliers(groups, base, guard.limit(multipliers))
        # ---- end of the hook ----

        if not skip:
            optimizer.step()
            guard.accept(step, train_loss)
            smooth_loss = train_loss if math.isnan(smooth_loss) else 0.9 * smooth_loss + 0.1 * train_loss
        plain_model.zero_grad(set_to_none=True)
        compute.synchronize()
        seconds_step = time.perf_counter() - t0
        seconds += seconds_step
        shown = guard.limit(multipliers).get("*", {})
        tokens_per_second = args.total_batch_size / seconds_step
        print0(
            f"step {step:05d}/{num_iterations:05d} | loss {smooth_loss:.4f} | lr x{shown.get('lr', 1.0):.3g} wd x{shown.get('weight_decay', 1.0):.3g} | "
            f"dt {seconds_step * 1e3:.1f}ms | tok/s {tokens_per_second:,.0f} | tflops {flops_per_step / seconds_step / 1e12:.3g} | "
            f"left {format_seconds(watch.tick(step + 1))}"
        )
        log.log(
            step=step,
            loss=train_loss,
            smooth_loss=smooth_loss,
            multipliers=guard.limit(multipliers),
            dt=seconds_step,
            tokens_per_second=tokens_per_second,
        )

        step += 1
        leaving = stop.requested() and step < num_iterations
        if leaving or (args.save_every and step % args.save_every == 0 and step < num_iterations):
            save(step)
        if leaving:
            if writer:
                writer.close()
            compute.barrier()  # when one rank leaves, torchrun ends the others
            print0(f"stopped after {step} steps; run the same command with --resume auto to go on")
            return REQUEUE_EXIT_CODE

    # -------------------------------------------------------------------------
    # done

    val_bpb = validate()
    print0(f"step {num_iterations:05d}/{num_iterations:05d} | val_bpb {val_bpb:.4f}")
    log.log(step=num_iterations, val_bpb=val_bpb)
    if writer:
        writer.close()
    loader.close()
    eval_loader.close()
    with evaluating():
        if compute.is_main:
            save_weights(
                folder / "model.safetensors",
                plain_model.state_dict(),
                {"model": vars(config), "tokenizer": tokenizer.fingerprint},
            )
            if args.sample_tokens:
                tokens = generate(
                    plain_model, [tokenizer.bos], args.sample_tokens, seed=derive_seed(args.seed, "sample") % 2**31
                )
                print0(f"sample: {tokenizer.decode(tokens)!r}")
    log.finish(
        val_bpb=val_bpb,
        train_loss=smooth_loss,
        seconds=seconds,
        steps=num_iterations,
        decisions=len(decision_seconds),
        controller_seconds=sum(decision_seconds),
        tokens=num_iterations * args.total_batch_size,
        flags=resumable_flags(args, MAY_CHANGE),
    )
    print0(f"done: val_bpb {val_bpb:.4f}, {format_seconds(seconds)} of training; see {folder}")
    compute.barrier()  # gloo aborts in a rank that tears down after another has gone
    return 0


# -----------------------------------------------------------------------------
# checks


def check_flags(args: argparse.Namespace) -> None:
    check_model(args)
    check_numbers(
        args,
        {
            (1, LARGEST): ["max_seq_len", "device_batch_size", "total_batch_size", "decision_interval"],
            (0, LARGEST): [
                "embedding_lr",
                "unembedding_lr",
                "matrix_lr",
                "scalar_lr",
                "weight_decay",
                "base_lr",
                "base_wd",
                "final_lr_frac",
                "sf_lr",
                "sf_wd",
                "sf_warmup",
                "eval_every",
                "eval_tokens",
                "sample_tokens",
                "save_every",
                "max_recoveries",
            ],
            (0, 1): ["warmup_ratio", "warmdown_ratio"],
            (0, 0.9999): ["adam_beta1", "adam_beta2", "sf_beta2"],
            (0.01, 0.9999): ["sf_beta1"],  # eval() divides by it
            (1e-6, LARGEST): ["target_param_data_ratio"],
        },
    )
    if args.num_iterations < 1 and args.num_iterations != -1:
        raise UserError(f"--num-iterations is {args.num_iterations}; give a number of steps, or -1 to derive it")


def check_batch(args: argparse.Namespace, tokens_per_micro_step: int) -> None:
    if args.total_batch_size % tokens_per_micro_step:
        nearest = max(1, round(args.total_batch_size / tokens_per_micro_step)) * tokens_per_micro_step
        raise UserError(
            f"--total-batch-size {args.total_batch_size} does not divide into micro-batches of {tokens_per_micro_step} tokens "
            f"(--device-batch-size x --max-seq-len x ranks); the nearest that does is {nearest}"
        )


def older_checkpoint(folder: Path, before: int, writer: CheckpointWriter | None, compute: Compute) -> tuple[int, dict]:
    """The newest checkpoint of a step up to `before`, or the oldest if all are later."""
    if writer:
        writer.wait()
    found = load_checkpoint_together(folder / "checkpoints", compute, before)
    if found is None:
        raise UserError(
            "the run diverged and has no checkpoint to go back to; give --save-every, or lower the learning rates"
        )
    return found


def global_grad_norm(model: GPT, compute: Compute) -> float:
    """L2 norm of the gradient averaged over ranks. The average stays in place: the optimizer's own then changes nothing."""
    gradients = [p.grad for p in model.parameters()]
    if compute.world_size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient.div_(compute.world_size)
    return torch.nn.utils.get_total_norm([g.float() if g.element_size() < 4 else g for g in gradients]).item()


def mean_over_ranks(loss: torch.Tensor, compute: Compute) -> float:
    if compute.world_size > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / compute.world_size
    return loss.item()


if __name__ == "__main__":
    run_main(main, JelError)
