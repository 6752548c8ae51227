"""Folders of runs, and whether what lies in one may be gone on with."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from nanochat.common import UserError, base_dir, read_json


def run_folder(tag: str) -> Path:
    """runs/<tag> under the base directory; a tag may name a subfolder, but not leave `runs`."""
    root = (base_dir() / "runs").resolve()
    folder = (root / tag).resolve()
    if root not in folder.parents:
        raise UserError(f"--model-tag {tag!r} does not name a folder inside {root}")
    return folder


def resumable_flags(args: argparse.Namespace, may_change: set[str]) -> dict:
    """The flags that must be the same when a run goes on."""
    return {k: v for k, v in vars(args).items() if k not in may_change}


def check_same_flags(saved: dict, args: argparse.Namespace, may_change: set[str], folder: Path) -> None:
    """Raise `UserError`, listing what differs, unless the run was started with these flags."""
    now = resumable_flags(args, may_change)
    changed = sorted(k for k in saved.keys() | now.keys() if saved.get(k) != now.get(k))
    if changed:
        listed = ", ".join(f"--{k.replace('_', '-')} {saved.get(k)} -> {now.get(k)}" for k in changed)
        raise UserError(f"{folder} holds a run with other flags ({listed}); give the same flags, another --model-tag, or --resume none")


def is_finished(folder: Path, args: argparse.Namespace, may_change: set[str]) -> bool:
    """Whether --resume auto finds this very run finished. Without it, what the folder holds is cleared away."""
    if args.resume == "auto":
        if not (folder / "result.json").exists():
            return False
        check_same_flags(read_json(folder / "result.json", "result")["flags"], args, may_change, folder)
        return True
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "result.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return False
