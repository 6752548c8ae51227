"""A sweep's runs by name, how far each has come, and the lines that say so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass

from nanochat.common import print0
from nanochat.run_log import format_seconds
from scripts.runs import run_folder


@dataclass(frozen=True)
class Job:
    """One run of base_train: its folder's tag, the setting as a row and as flags, and the flags common to the sweep."""

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


def describe(job: Job, row: dict) -> str:
    """`sf-2 lr 1.0 wd 0.0 warmup 0: val_bpb 2.2100, 25s`."""
    setting = " ".join([job.name, *(f"{key} {value}" for key, value in job.setting.items())])
    result = f"val_bpb {row['val_bpb']:.4f}" if row["val_bpb"] is not None else "diverged"
    recovered = f", {row['recoveries']} recoveries" if row["recoveries"] else ""
    return f"{setting}: {result}{recovered}, {format_seconds(row['seconds'])}"


class Progress:
    """A line for every run that ends and, in between, a status: redrawn on a terminal, else a line every 10 seconds.

    `rows` is filled by the caller as runs end; every run has `steps` steps.
    """

    def __init__(self, jobs: list[Job], rows: dict[str, dict], steps: int):
        self.jobs, self.rows, self.steps = jobs, rows, steps
        self.terminal = sys.stdout.isatty()
        self.clear, self.every = ("\r\x1b[K", 1.0) if self.terminal else ("", 10.0)
        self.begin = self.printed = time.monotonic()
        self.at_begin = self.steps_left()

    def steps_left(self) -> int:
        return sum(max(0, self.steps - steps_done(job)) for job in self.jobs if job.tag not in self.rows)

    def ended(self, job: Job, row: dict) -> None:
        print0(f"{self.clear}{len(self.rows)}/{len(self.jobs)} {describe(job, row)}")

    def status(self, running: list[Job]) -> None:
        now = time.monotonic()
        if not running or now - self.printed < self.every:
            return
        self.printed, left = now, self.steps_left()
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
