"""Folders of runs, and whether what lies in one may be gone on with."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from nanochat.common import Compute, UserError, base_dir, print0, read_json


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
    if compute.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another process is training in {folder}; give another --model-tag, or wait for it to end") from None
            print0(f"waiting for the process that is training in {folder} to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
    compute.barrier()
    return lock


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
