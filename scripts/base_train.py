"""Train a language model, with or without a controller on its learning rates and weight decay.

    python -m scripts.base_train                                       paper size on a GPU, tiny on a CPU
    python -m scripts.base_train --hparams uniform --controller jel    the paper's JEL run with the shipped policy
    torchrun --standalone --nproc_per_node 8 -m scripts.base_train     the same run on 8 GPUs
    python -m scripts.base_train --controller my_module:MyController   a controller of your own (see jel/controller.py)

Writes $NANOCHAT_BASE_DIR/runs/<tag>/: config.json, log.jsonl, checkpoints/, model.safetensors, result.json.
"""

from __future__ import annotations

import argparse
import time

import torch

from jel import Controller, Decision, JelError, apply_multipliers, as_decision, load_controller
from jel.knobs import LARGEST, even_decay
from nanochat.attention import ATTENTIONS
from nanochat.checkpoint import save_weights
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
from nanochat.dataloader import DataLoader
from nanochat.dataset import corpus_record, resolve_data
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.engine import generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import fitting_rows, free_bytes
from nanochat.loss_head import LOSSES, loss_kernel_for
from nanochat.lr_schedule import base_hparams
from nanochat.mlp_kernel import MLPS
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import Stopwatch, format_seconds
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.token_cache import TokenCache, epochs_line
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from nanochat.train_step import train_step
from scripts.evaluation import Evaluator
from scripts.hparams import HPARAM_NAMES, add_hparam_flags, add_model_flags, tuned_settings, uniform_decay
from scripts.presets import add_preset_flag, parse_with_preset
from scripts.run_state import Cost, Progress, RunState, checkpoints_to_keep
from scripts.runs import check_model, check_numbers, hold, is_finished, resumable_flags, run_folder
from scripts.training_log import TrainingLog
from scripts.update_judge import UpdateJudge

# -----------------------------------------------------------------------------
# flags (a default here is the paper's; presets list what they change)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    add_preset_flag(parser)
    add_model_flags(parser)
    flag("--max-seq-len", type=int, default=2048)
    # length and batch
    flag("--num-iterations", type=int, default=-1, help="optimizer steps; -1 = from --target-param-data-ratio")
    what = "floating-point operations of training, from which the steps follow; default: the flags beside decide"
    flag("--target-flops", type=float, help=what)
    flag("--target-param-data-ratio", type=float, default=4.0, help="training tokens per parameter")
    flag("--device-batch-size", type=int, default=32, help="rows per micro-batch and rank; -1 = what the memory holds")
    # hyperparameters
    add_hparam_flags(parser, "hand-tuned")
    what = (
        "--hparams uniform: base weight decay x sqrt(tokens of this run / these, an episode's), and one rate x decay "
    )
    what += "for all groups; 0 = neither; default: what the policy's card says"
    flag("--decay-carry", type=int, metavar="TOKENS", help=what)
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
    flag("--controller", default="none", help="none, jel, lhopt, schedule, or PYTHON.PATH:Class")
    flag("--policy", help="the controller's policy (or schedule) file; default: the policy shipped with the package")
    flag("--decision-interval", type=int, default=50, help="steps between decisions (lhopt: T / 20)")
    # evaluation, saving, logging
    flag(
        "--eval-every",
        type=int,
        default=141,  # a quarter of the paper's run: with 10M tokens each time, every 50 steps cost 15% of training
        help="steps between validations; 0 or -1 = only at the end",
    )
    flag("--eval-tokens", type=int, default=20 * 524288, help="read at each validation")
    flag("--test-tokens", type=int, default=20 * 524288, help="read once, at the end; 0 = the test split is not read")
    flag("--sample-tokens", type=int, default=64, help="tokens of sample text at the end; 0 = none")
    flag("--save-every", type=int, default=100, help="steps between checkpoints; 0 = none")
    flag(
        "--max-recoveries",
        type=int,
        default=8,
        help="times to skip a bad batch or to go back to a checkpoint before giving up; 0 = stop at the first",
    )
    what = "none, or auto: go on from the newest whole checkpoint of this run, if there is one"
    flag("--resume", choices=["none", "auto"], default="none", help=what)
    flag("--run", default="dummy", help="wandb run name; dummy = off")
    flag("--model-tag", default="", help="name of the run's folder; default d<depth>")
    flag("--device-type", default="", help="cuda or cpu; default: cuda if present")
    flag("--attention", choices=ATTENTIONS, default="auto", help="kernel; auto = on a GPU the fastest, by measurement")
    flag("--loss-kernel", choices=LOSSES, default="auto", help="likewise; triton-fp8 rounds the logits' product")
    flag("--mlp-kernel", choices=MLPS, default="auto", help="likewise")
    flag("--seed", type=int, default=42)
    return parser


MAY_CHANGE = {"resume", "run", "model_tag", "device_batch_size", "save_every", "device_type", "sample_tokens"}
MAY_CHANGE |= {"attention", "mlp_kernel"}  # the kernel of the loss may not: one of them rounds


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Controller | None]:
    """The flags over the preset's defaults, and the controller they name."""
    args = parse_with_preset(flags(), "base_train", argv)
    controller = load_controller(args.controller, args.policy)
    if args.decay_carry is None:
        args.decay_carry = getattr(controller, "decay_carry", 0) if args.hparams == "uniform" else 0
    # a policy that was trained again under the same name makes another run
    args.policy_digest = getattr(controller, "digest", None)
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
    lock = hold(folder, compute, wait=args.resume == "auto")  # noqa: F841  held until this process ends
    if is_finished(folder, args, MAY_CHANGE):
        print0(f"already finished: {folder}")
        return 0
    tokenizer = Tokenizer.load(tokenizer_folder(args.tokenizer))
    data = resolve_data(args.data)
    cache = TokenCache.build(data, tokenizer, compute)

    # -------------------------------------------------------------------------
    # model, length, optimizer

    model = build_model(args, tokenizer.vocab_size, compute)
    config = model.config
    if args.device_batch_size == -1:
        args.device_batch_size = rows_that_fit(args, config, compute)
    kernels = {"attention": args.attention, "loss": args.loss_kernel, "mlp": args.mlp_kernel}
    forward = model.prepare(rows=args.device_batch_size, **kernels)  # the model as it is called: compiled on CUDA
    print0(model.kernels)
    num_iterations, accumulation = derive_length(args, model, compute.world_size)
    optimizer, schedule = build_optimizer(args, model, num_iterations, compute)
    groups = optimizer.param_groups

    # -------------------------------------------------------------------------
    # data, evaluation

    order = {"rows_per_step": args.total_batch_size // args.max_seq_len, "seed": derive_seed(args.seed, "data")}
    where = compute.device, compute.rank, compute.world_size
    loader = DataLoader(cache, "train", args.device_batch_size, args.max_seq_len, *where, **order)
    if line := epochs_line(cache, num_iterations * args.total_batch_size):
        print0(line)
    cost = Cost()
    evaluator = Evaluator(args, forward, optimizer, cache, tokenizer, compute, cost)

    # -------------------------------------------------------------------------
    # what changes while the run trains, and resuming it

    if controller and args.decision_interval > num_iterations:
        print0(f"warning: a decision every {args.decision_interval} steps: the controller decides once, at the start")
    watch_with(controller, optimizer, compute)
    guard, progress = DivergenceGuard(args.max_recoveries), Progress()
    parts = {"model": model, "optimizer": optimizer, "controller": controller}
    parts |= {"guard": guard, "progress": progress, "cost": cost}
    state = RunState(folder, args, MAY_CHANGE, compute, checkpoints_to_keep(args.save_every), **parts)
    resumed = state.resume() if args.resume == "auto" else None
    if resumed is None and args.save_every:
        state.save(0)  # so that there is always something to go back to
    record = {"flags": vars(args), "model": vars(config), "parameters": model.num_params(), "data": corpus_record(data)}
    record |= {"tokenizer": tokenizer.fingerprint, "num_iterations": num_iterations}
    size = num_iterations, args.total_batch_size, model.flops_per_token()
    log = TrainingLog(*size, folder, record, compute, resumed, recoveries=guard.tries, wandb_name=args.run)

    # -------------------------------------------------------------------------
    # loop

    step, spent = resumed or 0, cost.steps  # `spent` before this process
    watch = Stopwatch(num_iterations, done=step)
    observes_norm = controller is not None and "grad_norm" in controller.observes
    judge = UpdateJudge(guard, model, evaluator, loader, progress, observes_norm, late=compute.is_cuda)
    pauses = [args.eval_every, args.save_every, args.decision_interval if controller else 0]  # need all that was seen
    while step < num_iterations:
        if args.eval_every > 0 and step % args.eval_every == 0:
            log.evaluated(step, val_bpb=evaluator.bits_per_byte("val"))
        judge.start_clock()
        go_back, held = None, guard.limit(progress.multipliers)  # `held` in the last step

        # ---- the hook: base schedule, controller, param groups ----
        base = base_hparams(groups, step, num_iterations, **schedule)
        if controller and step % args.decision_interval == 0 and step != progress.returned_to:
            decision = decide(controller, step, num_iterations, progress, evaluator)
            progress.multipliers, go_back = decision.multipliers, decision.go_back
            if args.decay_carry:
                progress.multipliers = even_decay(progress.multipliers)
        multipliers = guard.limit(progress.multipliers)
        apply_multipliers(groups, base, multipliers)
        # ---- end of the hook ----

        if go_back is not None:
            guard.count(f"step {step}: the controller asks to go back,", "allow more, or use another controller")
            decided, (back, _) = progress.multipliers, state.go_back(max(0, step - go_back), controller_too=False)
            progress.multipliers, progress.returned_to = decided, back
            log.returned(step, back, f"step {step}: the controller asks to go back {go_back} steps", guard.tries)
            step, watch = back, Stopwatch(num_iterations, done=back)
            continue

        judge.expect(step, multipliers, held)
        train_step(forward, optimizer, [loader.get(step, i) for i in range(accumulation)], compute, accept=judge)

        step += 1
        leaving = stop.requested(step) and step < num_iterations
        pause = leaving or step == num_iterations or any(n > 0 and step % n == 0 for n in pauses)
        for made in judge.look(everything=pause):  # this step; on a GPU the one before it, unless there is a pause
            if tell := getattr(controller, "observe", None):
                tell(train_loss=made.loss)
            warm_up = forward is not model and cost.steps - spent < 2
            cost.add_step(made.seconds, warm_up)
            if made.verdict is Verdict.GO_BACK:
                back, before = state.go_back(guard.reach(made.step), controller_too=True)
                log.returned(made.step, back, guard.cut(made.step, made.loss, made.held, before), guard.tries)
                judge.forget()
                step, watch = back, Stopwatch(num_iterations, done=back)
                break
            if made.verdict is Verdict.SKIP_SPIKE:
                log.event(made.step, guard.skip_line(made.step, made.loss), guard.tries)
            log.step(made, progress, warm_up, watch.tick(made.step + 1))
        else:
            if leaving or (args.save_every and step % args.save_every == 0 and step < num_iterations):
                state.save(step)
            if leaving:
                state.close()
                compute.barrier()  # when one rank leaves, torchrun ends the others
                print0(f"stopped after {step} steps; run the same command with --resume auto to go on")
                return REQUEUE_EXIT_CODE

    # -------------------------------------------------------------------------
    # done

    val_bpb = evaluator.bits_per_byte("val")
    log.evaluated(num_iterations, val_bpb=val_bpb)
    state.close()
    loader.close()
    with evaluator.weights_to_evaluate():
        if compute.is_main:
            about = {"model": vars(config), "tokenizer": tokenizer.fingerprint}
            save_weights(folder / "model.safetensors", model.state_dict(), about)
            print_sample(args, model, tokenizer)
    result = {"val_bpb": val_bpb, "test_bpb": None, "train_loss": progress.smooth_loss}
    if args.test_tokens:  # read once, when nothing is left to choose
        result["test_bpb"] = evaluator.bits_per_byte("test")
        log.evaluated(num_iterations, test_bpb=result["test_bpb"])
    result |= cost.total(args.total_batch_size, model.flops_per_token(), compute)
    result |= {"steps": num_iterations, "tokens": num_iterations * args.total_batch_size, "recoveries": guard.tries}
    log.finish(**result, flags=resumable_flags(args, MAY_CHANGE))
    print0(f"done: val_bpb {val_bpb:.4f}, {format_seconds(result['seconds'])} of training; see {folder}")
    compute.barrier()  # no rank closes its connections while another still needs them
    return 0


# -----------------------------------------------------------------------------
# model, length, optimizer


def build_model(args: argparse.Namespace, vocab_size: int, compute: Compute) -> GPT:
    """A model with fresh weights from torch's global generator, on the device."""
    size = args.depth, args.aspect_ratio, args.head_dim
    text = {"sequence_len": args.max_seq_len, "vocab_size": vocab_size}
    config = GPTConfig.from_depth(*size, **text, window_pattern=args.window_pattern)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=compute.device)
    model.init_weights()
    print0(
        f"model: depth {config.n_layer}, width {config.n_embd} in {config.n_head} heads, "
        f"vocabulary {config.vocab_size}, {model.num_params():,} parameters"
    )
    return model


def rows_that_fit(args: argparse.Namespace, config: GPTConfig, compute: Compute) -> int:
    """--device-batch-size -1: the most rows whose step fits the memory of every rank, by an estimate."""
    free = least_over_ranks(free_bytes(compute.device), compute)
    rows = args.total_batch_size // args.max_seq_len
    head = None, rows * args.max_seq_len, config.n_embd, config.padded_vocab, config.vocab_size
    kernel = loss_kernel_for(compute.device.type, compute.is_cuda, head, args.loss_kernel)
    fitting = fitting_rows(config, rows, compute.world_size, free, compute.is_cuda, kernel)
    fitting = least_over_ranks(fitting, compute)  # which may have chosen different kernels
    if fitting == 0:
        raise UserError(f"{rows} rows a step do not divide by {compute.world_size} ranks; change --total-batch-size")
    print0(f"rows per micro-batch and rank: {fitting} of {rows // compute.world_size}, {free / 1e9:.1f} GB are free")
    return fitting


def derive_length(args: argparse.Namespace, model: GPT, world_size: int) -> tuple[int, int]:
    """(steps of the run, micro-batches of a step). Raises `UserError` for a batch that does not divide.

    --target-flops is no preset's, so it goes before --num-iterations, which is some presets'; then the ratio.
    """
    n_params, step_flops = model.num_params(), model.flops_per_token() * args.total_batch_size
    micro = args.device_batch_size * args.max_seq_len * world_size  # tokens
    if args.total_batch_size % micro:
        nearest = max(1, round(args.total_batch_size / micro)) * micro
        raise UserError(
            f"--total-batch-size {args.total_batch_size} does not divide into micro-batches of {micro} tokens "
            f"(--device-batch-size x --max-seq-len x ranks); the nearest that does is {nearest}"
        )
    ratio = args.target_param_data_ratio
    if args.target_flops is not None:
        steps = max(1, round(args.target_flops / step_flops))
        given = f"--target-flops {args.target_flops:.3g} / {step_flops:.3g} a step"
    elif args.num_iterations != -1:
        steps, given = args.num_iterations, "--num-iterations"
    else:
        steps = max(1, round(ratio * n_params / args.total_batch_size))
        given = f"{ratio:g} tokens per parameter x {n_params:,} / {args.total_batch_size:,} a step"
    accumulation = args.total_batch_size // micro
    print0(
        f"length: {steps} steps x {args.total_batch_size:,} tokens (= {accumulation} micro-batches x {micro:,}) "
        f"= {steps * args.total_batch_size / n_params:.2f} tokens per parameter = {steps * step_flops:.3g} FLOPs; "
        f"steps: {given}"
    )
    return steps, accumulation


def build_optimizer(args: argparse.Namespace, model: GPT, steps: int, compute: Compute):
    """(optimizer, base schedule): every group with its base values, `initial_lr` and `initial_wd`."""
    optimizer = model.setup_optimizer(**tuned_settings(args), rank=compute.rank, world_size=compute.world_size)
    if args.hparams == "uniform":
        decay = uniform_decay(args, steps * args.total_batch_size)
        for group in optimizer.param_groups:
            group["initial_lr"], group["initial_wd"] = args.base_lr, decay
    schedule = {
        "warmup_ratio": args.warmup_ratio,
        "warmdown_ratio": args.warmdown_ratio,
        "final_lr_frac": args.final_lr_frac,
        "final_wd_frac": 0.0,
    }
    if args.optimizer == "schedule-free":
        if args.sf_muon_schedule == "constant":
            schedule = {"warmup_ratio": 0.0, "warmdown_ratio": 0.0, "final_lr_frac": 1.0, "final_wd_frac": 1.0}
        given = args.sf_lr, args.sf_wd, args.sf_warmup, compute.rank, compute.world_size
        optimizer = ScheduleFreeMuon(optimizer.param_groups, *given, betas=(args.sf_beta1, args.sf_beta2))
        for group in optimizer.param_groups:  # Muon as it is: no batch rule, no depth rule (the paper's Table 3)
            group["initial_lr"], group["initial_wd"] = args.matrix_lr, args.weight_decay
    for group in optimizer.param_groups:
        values = f"lr {group['initial_lr']:.4g}, weight decay {group['initial_wd']:.4g}"
        print0(f"  {group['name']:>16} {group['kind']:>6}: {len(group['params'])} tensors, {values}")
    return optimizer, schedule


# -----------------------------------------------------------------------------
# deciding, sampling


def watch_with(controller: Controller | None, optimizer, compute: Compute) -> None:
    """Attach a controller that watches the optimizer. Raises `UserError` where what it would see is not the truth."""
    if attach := getattr(controller, "attach", None):
        attach(optimizer)
        if getattr(controller, "watches", False) and compute.world_size > 1:
            raise UserError("a policy that watches the optimizer runs on one rank: gradients are averaged inside it")


def decide(controller: Controller, step: int, steps: int, progress: Progress, evaluator: Evaluator) -> Decision:
    """Ask the controller, showing it what it declared that it observes and nothing else."""
    t0 = time.perf_counter()
    observations = {
        "progress": lambda: step / steps,
        "step": lambda: step,
        "train_loss": lambda: progress.train_loss,
        "grad_norm": lambda: progress.grad_norm,
        "probe_loss": evaluator.probe_loss,
    }
    # sorted: some are collective, so all ranks must measure them in one order
    seen = {name: float(observations[name]()) for name in sorted(controller.observes)}
    decision = as_decision(controller.decide(seen))
    evaluator.cost.decisions += 1
    evaluator.cost.controller_seconds += time.perf_counter() - t0
    return decision


def print_sample(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer) -> None:
    if args.sample_tokens:
        seed = derive_seed(args.seed, "sample") % 2**31
        tokens = generate(model, [tokenizer.bos], args.sample_tokens, seed=seed)
        print0(f"sample: {tokenizer.decode(tokens)!r}")


# -----------------------------------------------------------------------------
# checks


NOT_NEGATIVE = [
    *HPARAM_NAMES,
    *"final_lr_frac decay_carry sf_lr sf_wd sf_warmup eval_tokens test_tokens sample_tokens".split(),
    *"save_every max_recoveries".split(),
]


def check_flags(args: argparse.Namespace) -> None:
    """Raise `UserError` for a number with which nothing can be trained."""
    check_model(args)
    check_numbers(
        args,
        {
            (1, LARGEST): ["max_seq_len", "total_batch_size", "decision_interval", "target_flops"],
            (0, LARGEST): NOT_NEGATIVE,
            (0, 1): ["warmup_ratio", "warmdown_ratio"],
            (0, 0.9999): ["adam_beta1", "adam_beta2", "sf_beta2"],
            (0.01, 0.9999): ["sf_beta1"],  # eval() divides by it
            (1e-6, LARGEST): ["target_param_data_ratio"],
        },
    )
    if args.decay_carry and args.hparams != "uniform":
        raise UserError("--decay-carry is for --hparams uniform: hand-tuned weight decay is for the run at hand")
    if args.device_batch_size != -1:
        check_numbers(args, {(1, LARGEST): ["device_batch_size"]})
    if args.eval_every < -1:
        raise UserError(f"--eval-every is {args.eval_every}; give a number of steps, or -1 for none")
    if args.num_iterations < 1 and args.num_iterations != -1:
        raise UserError(f"--num-iterations is {args.num_iterations}; give a number of steps, or -1 to derive it")


if __name__ == "__main__":
    run_main(main, JelError)
