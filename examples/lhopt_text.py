"""A causal transformer on WikiText-103 under "lhopt".

    python -m examples.lhopt_text wikitext-103 --layers 12 --width 768 --batch 32 --device cuda

The folder holds wiki.train.tokens and wiki.valid.tokens, as WikiText-103 is distributed, or any two texts of these
names. Words outside of the most frequent `--vocabulary` are one unknown word, so perplexities compare with those of the
same vocabulary only. One pass over the text, as in the paper; the full size has not been run by us.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import jel
from examples.models_and_data import Transformer, word_rows


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, T + 1) of word numbers -> mean cross-entropy, nats a word."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, rows: torch.Tensor, batch: int) -> float:
    return float(torch.stack([loss_of(model, part) for part in rows.split(batch)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--val-rows", type=int, default=64, help="for the policy, 20 times a run")
    parser.add_argument("--policy", default="lhopt", help="lhopt, the shipped one, or the path of another's card")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, held_out, words = word_rows(args.data, args.vocabulary, args.length)
    rows, held_out = rows.to(args.device), held_out.to(args.device)
    order = torch.randperm(len(rows)).split(args.batch)
    steps = len(order)
    model = Transformer(words, args.length, args.width, args.layers, args.heads).to(args.device)
    optimizer = jel.adamw(model.parameters())
    guard = jel.ValidationGuard.of(model)  # keeps the best weights on validation; the end is their mean
    scheduler = jel.Scheduler(optimizer, steps, args.policy, guard=guard)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} words, {steps:,} steps")
    val_loss = lambda: evaluate(model, held_out[: args.val_rows], args.batch)
    scheduler.observe(val_loss=val_loss())
    for step, at in enumerate(order):
        loss = loss_of(model, rows[at.to(args.device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.observe(loss=loss)
        if scheduler.decision_due:  # 19 times a run
            scheduler.observe(val_loss=(val := val_loss()))
            rate = optimizer.param_groups[0]["lr"]
            print(f"step {step + 1}: val perplexity {math.exp(val):.2f}, lr {rate:.2e}", flush=True)
        scheduler.step()
    scheduler.observe(val_loss=val_loss())
    guard.load_best(val_loss)
    print(f"end: val perplexity {math.exp(evaluate(model, held_out, args.batch)):.2f}")


if __name__ == "__main__":
    main()
