"""One run, disturbed and started again until it is finished, with a record of what happened and what went wrong."""

from __future__ import annotations

import random
import re
import signal
from collections import Counter
from pathlib import Path

from scripts.soak.faults import damage, faults_for, full_disk, wait_for_moment
from scripts.soak.runs import TAG, RunProcess, RunSpec, outcome, send

FAILURES = ("mismatches", "steps lost", "hangs", "other failures")


class Trial:
    """A run in its own base directory, disturbed up to `max_faults` times and started again after each.

    `tally` counts faults by kind, resumes and failures; `events` lists the faults, `failures` what went wrong.
    `mounted`: the base directory is a small disk of its own.
    """

    def __init__(self, spec: RunSpec, base: Path, rng: random.Random, max_faults: int = 0, mounted: bool = False):
        self.spec, self.base, self.rng, self.faults_left, self.mounted = spec, base, rng, max_faults, mounted
        self.tally: Counter[str] = Counter()
        self.events: list[str] = []
        self.failures: list[str] = []
        self.damaged: set[tuple[int, int]] = set()

    def run(self) -> dict | None:
        """Start the run until it is finished. Returns its `outcome`, or None if something went wrong."""
        while not self.failures:
            newest, process = self.newest_checkpoint(), RunProcess(self.spec, self.base)
            try:
                what = self.disturb(process) if self.faults_left else ""
                code = process.wait()
            except TimeoutError as e:
                return self.fail(str(e), "hangs")
            finally:
                send(process.process_tree() if process.process.poll() is None else [], signal.SIGKILL)
            self.check_resume(process, newest)
            if code == 0:
                return None if self.failures else outcome(self.spec, self.base)
            if not what:
                return self.fail(f"exit status {code} without a fault")
            if self.faults_left and "alone" not in what and self.rng.random() < 0.4:
                self.damage_checkpoint()
        return None

    def disturb(self, process: RunProcess) -> str:
        """Inject one fault at a random moment and check what it led to; returns "" if the process ended before it."""
        moment = wait_for_moment(process, self.rng)
        if process.ended():
            return ""
        training = process.is_training()
        fill_disk = training and self.spec.limited_disk and self.rng.random() < 0.6
        if fill_disk:
            with full_disk(process, self.mounted) as what:
                code, allowed = process.wait(), {2}
        else:
            what, codes, early_codes = self.rng.choice(faults_for(self.spec))(process, self.rng)
            code, allowed = process.wait(), codes if training else early_codes
        self.record(what, moment)
        if code not in {0, *allowed}:  # 0: the fault came too late
            self.fail(f"{what} {moment}: exit status {code}")
        output = process.output()
        traceback = "Traceback" in output and training and self.spec.ranks == 1
        if traceback or fill_disk and code and "error: " not in output:
            self.fail(f"{what} {moment}: no clear error message")
        for step in re.findall(r"stopped after (?:update )?(\d+)", output)[-1:]:
            if (newest := self.newest_checkpoint()) != int(step):
                self.fail(f"{what} {moment}: stopped after {step}, but the newest checkpoint is {newest}", "steps lost")
        return what

    def damage_checkpoint(self) -> None:
        """Damage the newest checkpoint, if there is an older one to resume from."""
        whole = self.whole_checkpoints()
        if len(whole) > 1:
            path = whole[max(whole)]
            self.record(damage(path, self.rng), f"in {path.name}")
            self.damaged.add(identity(path))

    def check_resume(self, process: RunProcess, newest: int) -> None:
        """By its own output the process resumed from the newest checkpoint that was whole, or a newer one."""
        resumed = [int(step) for step in re.findall(r"resumed at (?:step|update) (\d+)", process.output())]
        self.tally["resumes"] += len(resumed)
        if resumed and resumed[0] < newest:
            self.fail(f"resumed at {resumed[0]}, though {newest} was saved", "steps lost", newest - resumed[0])

    def whole_checkpoints(self) -> dict[int, Path]:
        """The checkpoints that exist and were not damaged here, by step."""
        paths = self.base.glob(f"runs/{TAG}/checkpoints/step_*")
        return {int(path.name.removeprefix("step_")): path for path in paths if identity(path) not in self.damaged}

    def newest_checkpoint(self) -> int:
        return max(self.whole_checkpoints(), default=-1)

    def record(self, what: str, moment: str) -> None:
        self.faults_left -= 1
        self.tally.update(["faults", what.partition(":")[0], *["during a save"] * (moment == "during a save")])
        self.events.append(f"{what} {moment}")

    def fail(self, what: str, kind: str = "other failures", number: int = 1) -> None:
        self.tally[kind] += number
        self.failures.append(what)


def identity(path: Path) -> tuple[int, int]:
    """Tells a folder from a later one of the same name."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
