"""Flags that training scripts share, folders of runs, and whether what lies in one may be gone on with."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from jel.knobs import LARGEST
from nanochat.common import Compute, UserError, base_dir, print0
from nanochat.files import read_json
from nanochat.gpt import VE_GATE_CHANNELS, GPTConfig


def run_folder(tag: str) -> Path:
    """runs/<tag> under the base directory; a tag may name a subfolder, but not leave `runs`."""
    root = (base_dir() / "runs").resolve()
    folder = (root / tag).resolve()
    if root not in folder.parents:
        raise UserError(f"--model-tag {tag!r} does not name a folder inside {root}")
    return folder


def hold(folder: Path, compute: Compute, wait: bool) -> IO | None:
    """Keep other processes from training in `folder` for as long as the file that this returns is open.

    If one does already (say, a rank that outlived its torchrun), wait for it to end, or raise `UserError`. Collective.
    """
    lock = None
    with compute.together():
        if compute.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if not wait:
                    raise UserError(
                        f"another process is training in {folder}; give another --model-tag, or wait for it to end"
                    ) from None
                print0(f"waiting for the process that is training in {folder} to end")
                fcntl.lockf(lock, fcntl.LOCK_EX)
    return lock


def check_numbers(args: argparse.Namespace, ranges: dict[tuple[float, float], list[str]]) -> None:
    """Raise `UserError` unless the flags listed under each (least, most) lie in that range; NaN lies in none."""
    for (least, most), names in ranges.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not least <= value <= most:
                bounds = f"be at least {least:g}" if most == LARGEST else f"lie in [{least:g}, {most:g}]"
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must {bounds}")


def check_model(args: argparse.Namespace) -> None:
    """Raise `UserError` for sizes and windows of which no model can be made."""
    check_numbers(args, {(1, LARGEST): ["depth", "aspect_ratio", "head_dim"]})
    if args.head_dim % 2:
        raise UserError(f"--head-dim is {args.head_dim}; the rotary embedding needs an even number")
    width = GPTConfig.from_depth(args.depth, args.aspect_ratio, args.head_dim).n_embd
    if width < VE_GATE_CHANNELS:
        raise UserError(f"--depth x --aspect-ratio makes a width of {width}; it must be at least {VE_GATE_CHANNELS}")
    if set(args.window_pattern) - {"S", "L"} or not args.window_pattern:
        raise UserError(f"--window-pattern is {args.window_pattern!r}; it may hold only S (half context) and L (full)")


def resumable_flags(args: argparse.Namespace, may_change: set[str]) -> dict:
    """The flags that must be the same when a run goes on."""
    return {k: v for k, v in vars(args).items() if k not in may_change}


def check_same_flags(saved, args: argparse.Namespace, may_change: set[str], folder: Path) -> None:
    """Raise `UserError`, listing what differs, unless the run was started with these flags."""
    now = resumable_flags(args, may_change)
    if not isinstance(saved, dict):
        raise UserError(
            f"{folder} does not say with which flags its run was started; give another --model-tag, or --resume none"
        )
    changed = sorted(k for k in saved.keys() | now.keys() if saved.get(k) != now.get(k))
    if changed:
        listed = ", ".join(f"--{k.replace('_', '-')} {saved.get(k)} -> {now.get(k)}" for k in changed)
        raise UserError(
            f"{folder} holds a run with other flags ({listed}); "
            "give the same flags, another --model-tag, or --resume none"
        )


def is_finished(folder: Path, args: argparse.Namespace, may_change: set[str]) -> bool:
    """Whether --resume auto finds this very run finished. Without it, what the folder holds is cleared away."""
    if args.resume == "auto":
        if not (folder / "result.json").exists():
            return False
        result = read_json(folder / "result.json", "result")
        check_same_flags(result.get("flags") if isinstance(result, dict) else None, args, may_change, folder)
        return True
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return False
