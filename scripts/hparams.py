"""Flags that base_train and meta_train share: the model, its data, the base setting and its schedule."""

from __future__ import annotations

import argparse
import math

from nanochat.common import print0

HPARAM_NAMES = ["embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "base_lr", "base_wd"]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model's shape, without the sequence length, and what it is trained on."""
    flag = parser.add_argument
    flag("--depth", type=int, default=6, help="layers; width and heads follow from it")
    flag("--aspect-ratio", type=int, default=64, help="width = depth x this, rounded up to a multiple of --head-dim")
    flag("--head-dim", type=int, default=128)
    what = "per layer, tiled: S sees half the context, L all of it; the last layer is always L"
    flag("--window-pattern", default="SSSL", help=what)
    flag("--data", default="fineweb-edu", help="fineweb-edu, embedded, or a folder of .parquet, .jsonl or .txt")
    flag("--tokenizer", default="default", help="name of a tokenizer trained by scripts.tok_train")


def add_hparam_flags(parser: argparse.ArgumentParser, default: str) -> None:
    """`default`: hand-tuned or uniform."""
    flag = parser.add_argument
    what = "per-group rates, or one for all (--base-lr, --base-wd)"
    flag("--hparams", choices=["hand-tuned", "uniform"], default=default, help=what)
    flag("--embedding-lr", type=float, default=0.3)
    flag("--unembedding-lr", type=float, default=0.004)
    flag("--matrix-lr", type=float, default=0.02)
    flag("--scalar-lr", type=float, default=0.5)
    flag("--weight-decay", type=float, default=0.2, help="Muon's, at depth 12; scaled by (12 / depth)^2")
    flag("--adam-beta1", type=float, default=0.8)
    flag("--adam-beta2", type=float, default=0.95)
    what = "hand-tuned rates x sqrt(batch tokens / 2^19), or as they are"
    flag("--lr-batch-rule", choices=["sqrt", "none"], default="sqrt", help=what)
    flag("--total-batch-size", type=int, default=524288, help="tokens per optimizer step of the run, over all ranks")
    flag("--base-lr", type=float, default=1e-3, help="--hparams uniform: every group's rate")
    flag("--base-wd", type=float, default=1e-2, help="--hparams uniform: every group's weight decay")
    flag("--warmup-ratio", type=float, default=0.0)
    flag("--warmdown-ratio", type=float, default=0.4)
    flag("--final-lr-frac", type=float, default=0.0)


def uniform_decay(args: argparse.Namespace, tokens: int) -> float:
    """--base-wd for a run of so many tokens: carried there from the episodes that --decay-carry names, if any."""
    if not args.decay_carry:
        return args.base_wd
    factor = math.sqrt(tokens / args.decay_carry)
    print0(f"weight decay: base x {factor:.3g}, carried to {tokens:,} tokens from episodes of {args.decay_carry:,}")
    return args.base_wd * factor


def tuned_settings(args: argparse.Namespace) -> dict:
    """The arguments of `GPT.setup_optimizer` for --hparams hand-tuned."""
    batch_scale = math.sqrt(args.total_batch_size / 2**19) if args.lr_batch_rule == "sqrt" else 1.0
    return {
        "unembedding_lr": args.unembedding_lr * batch_scale,
        "embedding_lr": args.embedding_lr * batch_scale,
        "matrix_lr": args.matrix_lr * batch_scale,
        "scalar_lr": args.scalar_lr * batch_scale,
        "weight_decay": args.weight_decay * (12 / args.depth) ** 2,
        "adam_betas": (args.adam_beta1, args.adam_beta2),
    }
