"""Evaluate a trained model: bits per byte on some splits, and samples of text.

python -m scripts.base_eval --model-tag d6                          what scripts.base_train saved in runs/d6
python -m scripts.base_eval --model-tag d6 --splits val test        bits per byte on validation and test
python -m scripts.base_eval --model-tag d6 --prompt "def main("     continue a text of your own
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nanochat.checkpoint import check_tensors, load_model_weights, untrusted
from nanochat.common import UserError, init_compute, print0, run_main
from nanochat.dataloader import DataLoader
from nanochat.dataset import resolve_data
from nanochat.engine import generate
from nanochat.files import read_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.token_cache import SPLITS, TokenCache
from nanochat.tokenizer import Tokenizer, tokenizer_folder
from scripts.runs import run_folder


def load_run(folder: Path, device: torch.device) -> tuple[GPT, Tokenizer, str]:
    """The model of a finished run on `device`, its tokenizer, and the name of the data it was trained on.

    No weight is rounded: each keeps its saved dtype (a schedule-free run's embeddings are fp32 on CUDA, too), or
    becomes fp32 on a CPU. Raises `UserError` for files that are missing, malformed or do not belong together.
    """
    record = read_json(folder / "config.json", "the run's config")
    weights = load_model_weights(folder / "model.safetensors")
    with untrusted(folder / "config.json"):
        name, data = str(record["flags"]["tokenizer"]), str(record["flags"]["data"])
        config = GPTConfig(**record["model"])
        tokenizer = Tokenizer.load(tokenizer_folder(name))
        if tokenizer.fingerprint != record["tokenizer"]:
            raise UserError(f"tokenizer {name!r} is not the one that {folder} was trained with; restore that one")
        if not 0 < config.n_layer <= len(weights):
            raise ValueError(f"{config.n_layer} layers, but the weights are {len(weights)} tensors")
        with torch.device("meta"):
            model = GPT(config)
        check_tensors(model.state_dict(), weights, str(folder / "model.safetensors"))
        model.to_empty(device=device)
        model.fill_rotary()
        for name, t in weights.items():
            weights[name] = t.to(device, torch.float32 if device.type == "cpu" else t.dtype)
        model.load_state_dict(weights, assign=True)
    return model.eval(), tokenizer, data


def main() -> None:
    # -------------------------------------------------------------------------
    # flags

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model-tag", required=True, help="the run's folder under runs/")
    flag("--data", help="default: what the run was trained on")
    flag("--splits", nargs="+", choices=SPLITS, default=["train", "val"], help="which to evaluate")
    flag("--device-batch-size", type=int, default=16, help="rows at a time")
    flag("--eval-tokens", type=int, default=262144, help="per split")
    flag("--prompt", action="append", help="text to continue; may be given several times")
    flag("--max-tokens", type=int, default=64, help="per sample")
    flag("--temperature", type=float, default=1.0, help="0 = greedy")
    flag("--top-k", type=int, default=50)
    flag("--device-type", default="", help="cuda or cpu; default: cuda if present")
    flag("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.temperature < 0 or min(args.device_batch_size, args.eval_tokens, args.max_tokens, args.top_k) < 1:
        raise UserError("batch size, tokens and top-k must be at least 1, the temperature at least 0")

    # -------------------------------------------------------------------------
    # the model

    compute = init_compute(args.device_type)
    model, tokenizer, data = load_run(run_folder(args.model_tag), compute.device)

    # -------------------------------------------------------------------------
    # bits per byte

    T = model.config.sequence_len
    cache = TokenCache.build(resolve_data(args.data or data), tokenizer, compute)
    token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=compute.device)
    steps = max(1, args.eval_tokens // (args.device_batch_size * T * compute.world_size))
    for split in args.splits:
        loader = DataLoader(cache, split, args.device_batch_size, T, compute.device, compute.rank, compute.world_size)
        with compute.autocast():
            bpb = bits_per_byte(model, (loader.get(i) for i in range(steps)), token_bytes, compute.world_size)
        loader.close()
        print0(f"{split} bpb {bpb:.4f} over {steps * args.device_batch_size * T * compute.world_size:,} tokens")

    # -------------------------------------------------------------------------
    # samples

    if compute.is_main:
        for i, prompt in enumerate(args.prompt or ["", "def ", "The "]):
            tokens = tokenizer.encode(prompt, bos=True)[-(T - 1) :]
            with compute.autocast():
                new = generate(
                    model, tokens, args.max_tokens, args.temperature, args.top_k, seed=args.seed + i, stop=tokenizer.bos
                )
            print0(f"sample: {prompt + tokenizer.decode(new)!r}")


if __name__ == "__main__":
    run_main(main)
