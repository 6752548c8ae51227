"""The sizes that the benchmark measures: a preset's training step and episode, and two fixed ones.

A shape is `{"model": GPTConfig's fields, "rows": rows per micro-batch, "accumulation": micro-batches per step}`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from nanochat.gpt import GPTConfig
from scripts import base_train, meta_train
from scripts.presets import PRESETS, parse_with_preset

MID = {
    "model": asdict(GPTConfig(sequence_len=256, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)),
    "rows": 4,
}
SMALL_EPISODE = {
    "model": asdict(GPTConfig(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)),
    "rows": 4,
}


def preset_shapes(preset: str) -> tuple[dict, dict, argparse.Namespace, argparse.Namespace]:
    """The shapes of the preset's training step and episode, and its flags for `base_train` and `meta_train`."""
    train = parse_with_preset(base_train.flags(), "base_train", ["--preset", preset])
    meta = parse_with_preset(meta_train.flags(), "meta_train", ["--preset", preset])
    vocab_size = PRESETS[preset].get("tok_train", {}).get("vocab_size", GPTConfig.vocab_size)

    def model(args, sequence_len):
        config = GPTConfig.from_depth(
            args.depth,
            args.aspect_ratio,
            args.head_dim,
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            window_pattern=args.window_pattern,
        )
        return asdict(config)

    step = {
        "model": model(train, train.max_seq_len),
        "rows": train.device_batch_size,
        "accumulation": train.total_batch_size // (train.device_batch_size * train.max_seq_len),
    }
    return step, {"model": model(meta, meta.episode_seq_len), "rows": meta.episode_batch_size}, train, meta


def one_micro_batch(step: dict, device: str) -> dict:
    """The step with one micro-batch: on a GPU a small one, of which 8 runs side by side fit its memory."""
    rows = max(4, step["rows"] // 8) if device == "cuda" else step["rows"]
    return {**step, "rows": rows, "accumulation": 1}


def tokens(shape: dict) -> int:
    """Tokens per optimizer step."""
    return shape["rows"] * shape["model"]["sequence_len"] * shape.get("accumulation", 1)


def describe(shape: dict) -> str:
    """Depth, width and micro-batch, as a row's name has them."""
    m = shape["model"]
    return f"{m['n_layer']} x {m['n_embd']}, {shape['rows']} x {m['sequence_len']} tokens"
