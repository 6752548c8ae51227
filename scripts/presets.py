"""What the presets change. A flag's default is the `paper` preset's and stands on its argparse line; the others list
only what differs, per script. `--preset auto` is `paper` with a GPU and `tiny` without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from jel.recipes.jel import OURS
from nanochat.common import UserError, run_main

_TINY = {"depth": 2, "aspect_ratio": 32, "head_dim": 32, "tokenizer": "tiny", "data": "embedded"}
_SMOKE = {"depth": 2, "aspect_ratio": 16, "head_dim": 16, "tokenizer": "smoke", "data": "embedded"}

# What --recipe changes in meta_train's defaults, which are the paper's, before a preset does.
RECIPES: dict[str, dict] = {"jel": OURS, "paper": {}}

_TINY_RUN = {
    **_TINY,
    "max_seq_len": 128,
    "num_iterations": 250,
    "total_batch_size": 2048,
    "device_batch_size": 16,
    "lr_batch_rule": "none",
    "eval_every": 25,
    "eval_tokens": 65536,
    "test_tokens": 65536,
    "save_every": 50,
}
_TINY_EPISODES = {
    **_TINY,
    "num_iterations": 75,
    "decision_interval": 15,
    "episode_seq_len": 64,
    "episode_batch_size": 8,
    "lr_batch_rule": "none",
    "total_batch_size": 2048,
}
_TINY_JEL = {"updates": 9, "compare": 1, "num_iterations": 100, "decision_interval": 20}

PRESETS: dict[str, dict[str, dict]] = {
    "paper": {"meta_train --recipe jel": {"updates": 9, "compare": 1}},  # assumption: as at tiny, not run
    "tiny": {
        "sweep": {"seeds": [42, 43, 44, 45, 46]},
        "tok_train": {"data": "embedded", "vocab_size": 512, "name": "tiny"},
        "base_train": _TINY_RUN,
        "meta_train": _TINY_EPISODES,
        "meta_train --recipe paper": {"policy_lr": 3e-3, "updates": 10},
        "meta_train --recipe jel": _TINY_JEL,
    },
    # 13 times tiny's tokens a run, in batches 16 times an episode's: learning costs less than one.
    "small": {
        "sweep": {"seeds": [42, 43, 44, 45, 46]},
        "tok_train": {"data": "embedded", "vocab_size": 512, "name": "tiny"},
        "base_train": {
            **_TINY_RUN,
            "num_iterations": 800,
            "total_batch_size": 8192,
            "eval_every": 160,
            "save_every": 160,
            "decision_interval": 160,
        },
        "meta_train": _TINY_EPISODES,
        "meta_train --recipe paper": {"policy_lr": 3e-3, "updates": 10},
        "meta_train --recipe jel": _TINY_JEL,
    },
    "smoke": {
        "sweep": {"seeds": [42], "settings": 2},
        "tok_train": {"data": "embedded", "vocab_size": 320, "name": "smoke"},
        "base_train": {
            **_SMOKE,
            "max_seq_len": 64,
            "num_iterations": 12,
            "total_batch_size": 256,
            "device_batch_size": 2,
            "lr_batch_rule": "none",
            "eval_every": 6,
            "eval_tokens": 1024,
            "test_tokens": 1024,
            "save_every": 6,
            "decision_interval": 4,
            "sample_tokens": 8,
        },
        "meta_train": {
            **_SMOKE,
            "num_iterations": 12,
            "decision_interval": 4,
            "episode_seq_len": 32,
            "episode_batch_size": 2,
            "lr_batch_rule": "none",
            "total_batch_size": 256,
            "updates": 3,
            "episodes": 4,
            "save_every": 1,
        },
        "meta_train --recipe jel": {"compare": 1},
    },
}


def add_preset_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=["auto", *PRESETS],
        default="auto",
        help="smoke: seconds; tiny: minutes on a CPU; small: an hour or two on one; paper: the paper's size; "
        "auto: paper with a GPU, else tiny",
    )


def resolve_preset(name: str) -> str:
    """`auto` -> `paper` with a GPU, else `tiny`. Raises `UserError` if there is a GPU that torch does not see."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "paper"
    if evidence := gpu_evidence():
        raise UserError(
            f"this machine has a GPU ({evidence}), but torch {torch.__version__} does not see it; "
            "install a CUDA build of torch, or give --preset tiny to train on the CPU"
        )
    return "tiny"


def gpu_evidence() -> str | None:
    """What says that this machine has an NVIDIA GPU that this process may use, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # set by the user or a scheduler: empty or -1 means no GPU
        return None if visible.strip() in ("", "-1", "NoDevFiles") else f"CUDA_VISIBLE_DEVICES is {visible}"
    if Path("/dev/nvidia0").exists():
        return "/dev/nvidia0 exists"
    if tool := shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        return "nvidia-smi lists one" if "GPU " in listed else None
    return None


def parse_with_preset(
    parser: argparse.ArgumentParser, script: str, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse flags over the preset's defaults for `script`; a flag that is given wins. A preset's key must be a flag."""
    known = parser.parse_known_args(argv)[0]
    preset = resolve_preset(known.preset)
    values = dict(PRESETS[preset].get(script, {}))
    if recipe := getattr(known, "recipe", None):
        values |= RECIPES[recipe] | PRESETS[preset].get(f"{script} --recipe {recipe}", {})
    unknown = set(values) - {a.dest for a in parser._actions}
    if unknown:
        raise UserError(f"preset {preset} sets {sorted(unknown)}, which are no flags of {script}")
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    args.preset = preset
    return args


def main() -> None:
    """For speedrun.sh: prints the preset's name, the number of GPUs, and the preset's seeds."""
    from scripts.sweep.__main__ import flags  # here, because it imports this module

    if sys.argv[1] not in ("auto", *PRESETS):
        raise UserError(f"there is no preset {sys.argv[1]!r}; choose one of auto, {', '.join(PRESETS)}")
    args = parse_with_preset(flags(), "sweep", ["--preset", sys.argv[1], "--what", "methods"])
    print(args.preset, torch.cuda.device_count(), *args.seeds)


if __name__ == "__main__":
    run_main(main)
