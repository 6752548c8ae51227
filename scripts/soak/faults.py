"""What the soak test does to a run: the moments it waits for, the signals, damaged checkpoints, and a full disk."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat.preemption import REQUEUE_EXIT_CODE
from scripts.soak import runs
from scripts.soak.runs import POLL_SECONDS, RunProcess, RunSpec, send

# -----------------------------------------------------------------------------
# moments


def wait_for_moment(run: RunProcess, rng: random.Random) -> str:
    """Wait for a random moment of the process: while it starts, after some step, or in the middle of a save."""
    if run.spec.module == "sweep":
        return run.pause(rng.uniform(1, 25))
    kind = rng.choice(["start", "step", "step", "step", "save", "save"])
    if kind == "start":
        return run.pause(rng.uniform(0, 5))
    total, first = runs.STEPS if run.spec.module == "base_train" else runs.UPDATES, run.steps_before
    target = rng.randint(min(first, total - 1), total - 1)
    while not run.ended() and run.steps() <= target:
        time.sleep(POLL_SECONDS)
    if kind == "save":
        while not run.ended() and not is_saving(run.folder):
            time.sleep(POLL_SECONDS / 10)
        return "during a save"
    run.pause(rng.uniform(0, 0.03))
    return f"at step {run.steps()}"


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written: it has a temporary name until it is complete."""
    checkpoints = folder / "checkpoints"
    return checkpoints.exists() and any(name.startswith(".step_") for name in os.listdir(checkpoints))


# -----------------------------------------------------------------------------
# signals, sent to a process that has not ended

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Fault(NamedTuple):
    """What was done, and the exit statuses it may lead to: once the run is training, and before."""

    what: str
    codes: set[int]
    early_codes: set[int]


def kill(run: RunProcess, rng: random.Random) -> Fault:
    """SIGKILL to every process of the run at once, as in a power failure."""
    send(run.process_tree(), signal.SIGKILL)
    return Fault("SIGKILL", {-9}, {-9})


def stop(run: RunProcess, rng: random.Random) -> Fault:
    """A signal that asks the run to save and stop."""
    number = rng.choice(STOP_SIGNALS[:2] if run.spec.ranks > 1 else STOP_SIGNALS)  # torchrun does not handle SIGUSR1
    send([run.process.pid], number)
    return Fault(number.name, *stop_codes(run, number))


def stop_all(run: RunProcess, rng: random.Random) -> Fault:
    """The same signal to every process, as job schedulers and terminals send it; torchrun also forwards it."""
    number = rng.choice(STOP_SIGNALS[:2])
    send(run.process_tree(), number)
    return Fault(f"{number.name} to all", *stop_codes(run, number))


def stop_codes(run: RunProcess, number: int) -> tuple[set[int], set[int]]:
    """Exit statuses after a stop signal; early: no handler is installed yet, or Python raised KeyboardInterrupt."""
    code = REQUEUE_EXIT_CODE if run.spec.ranks == 1 else 1  # torchrun has exit statuses of its own
    return {code}, {code, -number, 130, 1}


def stop_twice(run: RunProcess, rng: random.Random) -> Fault:
    """Two stop signals: the second ends the run at once, unless it has stopped by then."""
    first, second = rng.choice(STOP_SIGNALS), rng.choice(STOP_SIGNALS)
    send([run.process.pid], first)
    run.pause(rng.uniform(0, 0.02))
    send([run.process.pid], second)
    codes = {REQUEUE_EXIT_CODE, 128 + second, -second}
    return Fault("two signals", codes, {*codes, -first, 130, 1})


def kill_rank(run: RunProcess, rng: random.Random) -> Fault:
    """SIGKILL to one rank: torchrun must restart all ranks by itself."""
    while not run.ended() and len(run.ranks()) < run.spec.ranks:
        time.sleep(POLL_SECONDS)
    if ranks := run.ranks():
        send([rng.choice(ranks)], signal.SIGKILL)
    return Fault("SIGKILL of one rank", {0}, {0})


def kill_parent(run: RunProcess, rng: random.Random) -> Fault:
    """Only torchrun, or the sweep, dies. Its children go on, and the next process of the run must wait for them."""
    number = rng.choice([signal.SIGKILL, *[signal.SIGUSR1] * (run.spec.ranks > 1)])
    send([run.process.pid], number)
    return Fault(f"{number.name} of the parent alone", {-number}, {-number})


def faults_for(spec: RunSpec) -> list[Callable[[RunProcess, random.Random], Fault]]:
    """The signal faults that a run of this kind must survive, the more frequent ones repeated."""
    if spec.module == "sweep":
        return [kill, stop, stop_all, kill_parent]
    if spec.ranks > 1:
        return [kill, kill_rank, kill_rank, stop, stop_all, kill_parent]
    return [kill, kill, stop, stop, stop_twice]


# -----------------------------------------------------------------------------
# damaged files and a full disk


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Truncate a file of the checkpoint, flip a bit of it, or remove it."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    data, how = bytearray(path.read_bytes()), rng.choice(["truncated", "flipped", "removed"])
    if how == "removed":
        path.unlink()
        return f"removed: {path.name}"
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data[:at] if how == "truncated" else data)
    return f"{how}: {path.name} at byte {at}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 16 MB at `folder`, if this process may mount one; yields whether it could."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full_disk(run: RunProcess, mounted: bool) -> Iterator[str]:
    """Fill the small disk; without one, limit the process's files to less than a checkpoint. Yields what was done."""
    if not mounted:
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2**17, 2**17))
        yield "file size limit"
        return
    filler = run.base / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while f.write(bytes(2**16)) == 2**16:
            pass
    try:
        yield "full tmpfs"
    finally:
        filler.unlink()
