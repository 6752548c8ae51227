"""Runs of base_train side by side, each in a process of its own: started, watched, ended in order, and read."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import shutil
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
from nanochat.run_log import format_seconds, read_log
from scripts import base_train
from scripts.runs import check_same_flags, is_finished, resumable_flags, run_folder


@dataclass(frozen=True)
class Job:
    """One run of base_train: its folder's tag, the setting as its row tells it and as flags, and the other flags."""

    tag: str
    setting: dict
    flags: list[str]
    common: list[str]

    @property
    def name(self) -> str:
        return self.tag.rpartition("/")[2]

    @property
    def argv(self) -> list[str]:
        return [*self.common, *self.flags, "--resume", "auto", "--model-tag", self.tag]


@dataclass(frozen=True)
class Places:
    """`jobs` runs side by side, each of `nproc` processes; `gpus` are the ids of the GPUs, [] on a CPU."""

    jobs: int
    nproc: int
    gpus: list[str]

    def start(self, job: Job, place: int, lock: int) -> subprocess.Popen:
        """Start the run in one of the `jobs` places, in our process group: what kills that leaves no run behind."""
        several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self.nproc), "-m"]
        command = [sys.executable, "-m", *(several if self.nproc > 1 else []), "scripts.base_train", *job.argv]
        environment = dict(os.environ)
        if self.gpus:
            mine = [self.gpus[(place * self.nproc + i) % len(self.gpus)] for i in range(self.nproc)]
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
GRACE = 1.0  # seconds in which a run tells of a signal it got


def run_jobs(jobs: list[Job], rows: dict[str, dict], steps: int, places: Places, lock: int) -> bool:
    """Run the jobs that have no row yet and put theirs into `rows`; False if a signal asked to stop before the last.

    Raises `UserError` naming the output of the first run that fails. Runs under way save and leave before this returns.
    """
    waiting, running = [job for job in jobs if job.tag not in rows], {}
    stop = StopRequest(Compute(0, 1, torch.device("cpu")))
    progress = Progress(jobs, rows, steps)
    try:
        while (waiting or running) and not stop.requested():
            while waiting and len(running) < places.jobs:
                place = min(set(range(places.jobs)) - running.keys())
                job = waiting.pop(0)
                running[place] = job, places.start(job, place, lock)
            time.sleep(POLL)
            for place, (job, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
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
    So we send one only to those that have not told of theirs after a while.
    """
    begin, told = time.monotonic(), set()
    while alive := [(job, process) for job, process in running if process.poll() is None]:
        for job, process in alive:
            if process.pid not in told and time.monotonic() - begin > GRACE:
                told.add(process.pid)
                if not any(": finishing the step" in line for line in output(job)):  # as nanochat.preemption says it
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


RESULT = {"val_bpb": float, "train_loss": float, "seconds": float, "tokens": int}  # what a row tells of a result


def row_of(job: Job) -> dict | None:
    """The row of a run that has finished or diverged, else None. Raises `UserError` if its folder holds another run."""
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
            started = argparse.Namespace(**read_json(folder / "config.json", "config")["flags"])
            check_same_flags(resumable_flags(started, may_change), args, may_change, folder)
            done = [float(record["dt"]) for record in read_log(folder) if "dt" in record]
    except UserError as e:
        raise UserError(f"{e}; or delete {folder}, and its run starts anew") from None
    return {
        **known,
        "val_bpb": None,
        "train_loss": None,
        "seconds": sum(done),
        "tokens": len(done) * args.total_batch_size,
        "error": diverged[-1],
    }


# -----------------------------------------------------------------------------
# progress


def describe(job: Job, row: dict) -> str:
    """`sf-2 lr 1.0 wd 0.0 warmup 0: val_bpb 2.2100, 25s`."""
    setting = " ".join([job.name, *(f"{key} {value}" for key, value in job.setting.items())])
    result = f"val_bpb {row['val_bpb']:.4f}" if row["val_bpb"] is not None else "diverged"
    return f"{setting}: {result}, {format_seconds(row['seconds'])}"


class Progress:
    """A line for every run that ends and, in between, a status: redrawn on a terminal, else a line every 10 seconds.

    `rows` is filled by the caller as runs end; every run has `steps` steps.
    """

    def __init__(self, jobs: list[Job], rows: dict[str, dict], steps: int):
        self.jobs, self.rows, self.steps = jobs, rows, steps
        self.terminal = sys.stdout.isatty()
        self.clear, self.every = ("\r\x1b[K", 1.0) if self.terminal else ("", 10.0)
        self.begin = self.told = time.monotonic()
        self.at_begin = self.steps_left()

    def steps_left(self) -> int:
        return sum(max(0, self.steps - steps_done(job)) for job in self.jobs if job.tag not in self.rows)

    def ended(self, job: Job, row: dict) -> None:
        print0(f"{self.clear}{len(self.rows)}/{len(self.jobs)} {describe(job, row)}")

    def status(self, running: list[Job]) -> None:
        now = time.monotonic()
        if not running or now - self.told < self.every:
            return
        self.told, left = now, self.steps_left()
        seconds = left * (now - self.begin) / (self.at_begin - left) if left < self.at_begin else None
        runs = ", ".join(f"{job.name} {steps_done(job)}/{self.steps}" for job in running)
        line = f"{len(self.rows)}/{len(self.jobs)} done | {runs} | left {format_seconds(seconds)}"
        if self.terminal:
            print0(self.clear + line[: shutil.get_terminal_size().columns - 1], end="")
        else:
            print0(line)


def steps_done(job: Job) -> int:
    """The steps a run has logged, from the last few lines of its log."""
    try:
        with open(run_folder(job.tag) / "log.jsonl", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 4096))
            lines = f.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # a line that is still being written, or the first one, cut
            record = json.loads(line)
            if "loss" in record:
                return record["step"] + 1
    return 0
