"""Runs of base_train side by side, each in a process of its own: started, watched, ended in order, and read."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.checkpoint import untrusted
from nanochat.common import Compute, UserError, print0
from nanochat.files import read_json
from nanochat.preemption import REQUEUE_EXIT_CODE, StopRequest
from nanochat.run_log import read_log
from scripts import base_train
from scripts.runs import check_same_flags, is_finished, resumable_flags, run_folder
from scripts.sweep.progress import Job, Progress


@dataclass(frozen=True)
class Devices:
    """`jobs` runs side by side, each of `nproc` processes; `gpus` are the ids of the GPUs, [] on a CPU."""

    jobs: int
    nproc: int
    gpus: list[str]

    def start(self, job: Job, slot: int, lock: int) -> subprocess.Popen:
        """Start the run in one of the `jobs` slots. It stays in our process group: killing the group leaves no run."""
        several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self.nproc), "-m"]
        command = [sys.executable, "-m", *(several if self.nproc > 1 else []), "scripts.base_train", *job.argv]
        environment = dict(os.environ)
        if self.gpus:
            mine = [self.gpus[(slot * self.nproc + i) % len(self.gpus)] for i in range(self.nproc)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        else:  # one thread: faster in total than fewer runs with more, and the bits do not depend on --jobs
            environment["OMP_NUM_THREADS"] = "1"
        run_folder(job.tag).mkdir(parents=True, exist_ok=True)
        with open(output_path(job), "w") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
            )


@contextlib.contextmanager
def alone(path: Path):
    """One such sweep at a time, by a lock that its runs inherit: if it is killed, the next waits for runs it left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print0("waiting for runs of an earlier start of this sweep to end")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield f.fileno()


# -----------------------------------------------------------------------------
# running

POLL = 0.2  # seconds between looks at the runs
GRACE = 1.0  # seconds in which a run prints that it received a signal


def run_jobs(jobs: list[Job], rows: dict[str, dict], steps: int, devices: Devices, lock: int) -> bool:
    """Run the jobs that have no row yet and put theirs into `rows`; False if a signal asked to stop before the last.

    Raises `UserError` naming the output of the first run that fails. Runs under way save and leave before this returns.
    """
    waiting, running = [job for job in jobs if job.tag not in rows], {}
    stop = StopRequest(Compute(0, 1, torch.device("cpu")))
    progress = Progress(jobs, rows, steps)
    try:
        while (waiting or running) and not stop.requested():
            while waiting and len(running) < devices.jobs:
                slot = min(set(range(devices.jobs)) - running.keys())
                job = waiting.pop(0)
                running[slot] = job, devices.start(job, slot, lock)
            time.sleep(POLL)
            for slot, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                row = row_of(job)
                if row:
                    rows[job.tag] = row
                    progress.ended(job, row)
                elif stop.requested() or process.returncode == REQUEUE_EXIT_CODE:
                    return False
                else:
                    raise UserError(failure(job, process.returncode))
            progress.status([job for job, _ in running.values()])
    finally:
        print0(progress.clear, end="")  # what is printed next begins a line
        end(list(running.values()))
    return len(rows) == len(jobs)


def end(running: list[tuple[Job, subprocess.Popen]]) -> None:
    """Have the runs save and leave, and wait for them.

    A second signal makes a run leave without saving, and a terminal's Ctrl-C (or a job scheduler) signals the runs too.
    So only those that have not printed that they received one are sent one.
    """
    begin, signalled = time.monotonic(), set()
    while alive := [(job, process) for job, process in running if process.poll() is None]:
        for job, process in alive:
            if process.pid not in signalled and time.monotonic() - begin > GRACE:
                signalled.add(process.pid)
                if not any(": finishing the step" in line for line in output(job)):  # nanochat.preemption's line
                    process.terminate()
        time.sleep(POLL)


def output_path(job: Job) -> Path:
    return run_folder(job.tag) / "output.txt"


def output(job: Job) -> list[str]:
    """The lines that the run's last start printed."""
    return output_path(job).read_text(errors="replace").splitlines() if output_path(job).exists() else []


def errors(job: Job) -> list[str]:
    """The errors among them, of every rank; under torchrun more lines follow."""
    return [line for line in output(job) if line.startswith("error: ")]


def failure(job: Job, code: int) -> str:
    last = next((line.strip() for line in reversed(errors(job) or output(job)) if line.strip()), "it printed nothing")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"
    return f"run {job.tag} {how} ({last}); all it printed is in {output_path(job)}"


RESULT = {key: float for key in ("val_bpb", "train_loss", "seconds", "core_seconds", "flops")}
RESULT |= {"tokens": int, "recoveries": int}  # what a row takes from a run's result.json


def row_of(job: Job) -> dict | None:
    """The row of a run that has finished or diverged, else None. Raises `UserError` if its folder holds another run.

    A row is the setting, its "flags" and "tag", and the numbers of its result. A run that diverged has "val_bpb" None
    and an "error"; its "flops" are None and its "tokens" say how far it came.
    """
    folder, (args, _) = run_folder(job.tag), base_train.parse(job.argv)
    may_change = base_train.MAY_CHANGE
    known = {**job.setting, "flags": job.flags, "tag": job.tag}
    try:
        if is_finished(folder, args, may_change):
            with untrusted(folder / "result.json"):
                result = read_json(folder / "result.json", "result")
                row = {**known, **{key: kind(result[key]) for key, kind in RESULT.items()}}
            finite = math.isfinite(row["val_bpb"])
            return row if finite else {**row, "val_bpb": None, "error": f"val_bpb is {row['val_bpb']}"}
        diverged = [line for line in errors(job) if "the run diverged" in line]
        if not diverged:
            return None
        with untrusted(folder):
            config = read_json(folder / "config.json", "config")
            started, machine = argparse.Namespace(**config["flags"]), config["environment"]
            check_same_flags(resumable_flags(started, may_change), args, may_change, folder)
            done = [float(record["dt"]) for record in read_log(folder) if "dt" in record]
            cores = int(machine["world_size"]) * (1 if torch.cuda.is_available() else int(machine["threads"]))
    except UserError as e:
        raise UserError(f"{e}; or delete {folder}, and its run starts anew") from None
    return {
        **known,
        "val_bpb": None,
        "train_loss": None,
        "seconds": sum(done),
        "core_seconds": sum(done) * cores,
        "flops": None,
        "tokens": len(done) * args.total_batch_size,
        "recoveries": 0,
        "error": diverged[-1],
    }
