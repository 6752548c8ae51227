"""Try to break runs: kill, damage and starve them at random moments, resume them, and compare with undisturbed ones.

    python -m scripts.soak --faults 100               about ten minutes on 2 cores
    python -m scripts.soak --minutes 60 --seed 7      an hour, other moments

Real processes at smoke size: base_train with each optimizer and kind of controller, meta_train, a sweep, on one and two
ranks. After every fault the same command is given again; what the run leaves in the end must be, bit for bit, what a run
leaves to which nothing happens. Exit status 1 if anything was not as promised. Writes to a temporary folder only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from jel.errors import JelError
from jel.policy import GaussianPolicy, save_policy
from jel.schedule import export_schedule, save_schedule
from nanochat.common import UserError, derive_seed, print0, run_main
from nanochat.run_log import format_seconds
from scripts.soak.faults import (
    Life,
    Subject,
    await_moment,
    damage,
    faults,
    no_room,
    remains,
    send,
    small_disk,
    subjects,
)

FAILURES = ("mismatches", "steps lost", "hangs", "other failures")


# -----------------------------------------------------------------------------
# one run


class Trial:
    """A run in its own base directory, disturbed up to `most` times and started again after each."""

    def __init__(self, subject: Subject, base: Path, rng: random.Random, most: int = 0, mounted: bool = False):
        self.subject, self.base, self.rng, self.left, self.mounted = subject, base, rng, most, mounted
        self.tally, self.story, self.wrong = Counter(), [], []
        self.damaged: set[tuple[int, int]] = set()

    def run(self) -> dict | None:
        """Start the run until it is finished; what it leaves, or None if something went wrong."""
        while not self.wrong:
            newest, life = self.newest(), Life(self.subject, self.base)
            try:
                what = self.disturb(life) if self.left else ""
                code = life.wait()
            except TimeoutError as e:
                return self.blame(str(e), "hangs")
            finally:
                send(life.family() if life.process.poll() is None else [], 9)
            self.check_resume(life, newest)
            if code == 0:
                return None if self.wrong else remains(self.subject, self.base)
            if not what:
                return self.blame(f"exit status {code} without a fault")
            if self.left and "alone" not in what and self.rng.random() < 0.4:
                self.damage()
        return None

    def disturb(self, life: Life) -> str:
        """One fault at a random moment, and what it led to; returns "" if the run was over before it."""
        moment = await_moment(life, self.rng)
        if life.ended():
            return ""
        begun = life.under_way()
        starve = begun and self.subject.starves and self.rng.random() < 0.6
        if starve:
            with no_room(life, self.mounted) as what:
                code, in_order = life.wait(), {2}
        else:
            what, *codes = self.rng.choice(faults(self.subject))(life, self.rng)
            code, in_order = life.wait(), codes[0 if begun else 1]
        self.tell(what, moment)
        if code not in {0, *in_order}:  # 0: it had been too late
            self.blame(f"{what} {moment}: exit status {code}")
        said = life.said()
        if "Traceback" in said and begun and self.subject.ranks == 1 or starve and code and "error: " not in said:
            self.blame(f"{what} {moment}: no clear line")
        for step in re.findall(r"stopped after (?:update )?(\d+)", said)[-1:]:
            if self.newest() != int(step):
                self.blame(
                    f"{what} {moment}: stopped after {step}, but the newest checkpoint is {self.newest()}", "steps lost"
                )
        return what

    def damage(self) -> None:
        whole = self.whole()
        if len(whole) > 1:  # one must be left to resume from
            path = whole[max(whole)]
            self.tell(damage(path, self.rng), f"in {path.name}")
            self.damaged.add(identity(path))

    def check_resume(self, life: Life, newest: int) -> None:
        """By the run's own word it went on from the newest checkpoint that was whole, or a newer one."""
        resumed = [int(step) for step in re.findall(r"resumed at (?:step|update) (\d+)", life.said())]
        self.tally["recoveries"] += len(resumed)
        if resumed and resumed[0] < newest:
            self.blame(f"resumed at {resumed[0]}, though {newest} was saved", "steps lost", newest - resumed[0])

    def whole(self) -> dict[int, Path]:
        """The checkpoints that are there and not damaged by us, by step."""
        paths = self.base.glob("runs/run/checkpoints/step_*")
        return {int(path.name[5:]): path for path in paths if identity(path) not in self.damaged}

    def newest(self) -> int:
        return max(self.whole(), default=-1)

    def tell(self, what: str, moment: str) -> None:
        self.left -= 1
        self.tally.update(["faults", what.partition(":")[0], *["in the middle of a save"] * (moment == "in a save")])
        self.story.append(f"{what} {moment}")

    def blame(self, what: str, kind: str = "other failures", number: int = 1) -> None:
        self.tally[kind] += number
        self.wrong.append(what)


def identity(path: Path) -> tuple[int, int]:
    """Of this very folder, not of another that comes to have its name."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


# -----------------------------------------------------------------------------
# all of them


class Soak:
    """Trials of all subjects in turn, `jobs` at a time, until there were `faults`, or `seconds` are over."""

    def __init__(self, folder: Path, names: list[str], seed: int, faults: float, seconds: float):
        self.folder, self.seed, self.left, self.end = folder, seed, faults, time.monotonic() + seconds
        self.tally, self.lock, self.numbers = Counter(), threading.Lock(), count()
        corpus, made = prepare(folder)
        everything = subjects(corpus, *made)
        if unknown := set(names) - everything.keys():
            raise UserError(f"--only {', '.join(sorted(unknown))}: there are {', '.join(everything)}")
        self.subjects = {name: subject for name, subject in everything.items() if not names or name in names}
        self.share = math.ceil(
            min(faults, 1000) / len(self.subjects)
        )  # of a trial, so that few faults reach every subject too

    def run(self, jobs: int) -> Counter:
        with ThreadPoolExecutor(jobs) as pool:
            expected = {name: pool.submit(self.undisturbed, name) for name in self.subjects}
            self.expected = {name: future.result() for name, future in expected.items()}
            print0(f"{len(self.expected)} undisturbed runs done: {', '.join(self.expected)}")
            for lane in [pool.submit(self.lane) for _ in range(jobs)]:
                lane.result()
        return self.tally

    def undisturbed(self, name: str) -> dict:
        trial = Trial(self.subjects[name], self.new_base(f"undisturbed-{name}"), random.Random())
        found = trial.run()
        if found is None:
            raise UserError(
                f"the undisturbed run failed ({'; '.join(trial.wrong)}); all it printed is in {trial.base}.txt"
            )
        return found

    def lane(self) -> None:
        while time.monotonic() < self.end:
            with self.lock:
                number = next(self.numbers)
                rng = random.Random(derive_seed(self.seed, "trial", number))
                most = min(rng.randint(3, 7), self.share, self.left)
                self.left -= most
            if not most:
                return
            name = list(self.subjects)[number % len(self.subjects)]
            spent = self.trial(number, name, rng, most)
            with self.lock:
                self.left += most - spent

    def trial(self, number: int, name: str, rng: random.Random, most: int) -> int:
        subject, folder = self.subjects[name], self.folder / f"trial-{number}"
        with small_disk(folder) if subject.starves else contextlib.nullcontext(False) as mounted:
            trial = Trial(subject, self.new_base(f"trial-{number}"), rng, most, mounted)
            found, expected = trial.run(), self.expected[name]
            if found is not None and (differing := [key for key in expected if found.get(key) != expected[key]]):
                trial.blame(f"not what the undisturbed run left: {', '.join(differing)}", "mismatches")
            if trial.wrong:
                shutil.copytree(trial.base, self.folder / f"failed-{number}", symlinks=True)
        shutil.rmtree(folder)
        trial.tally["runs compared"] += found is not None
        with self.lock:
            self.tally += trial.tally
            verdict = (
                f"FAILED, {'; '.join(trial.wrong)}; see {self.folder / f'failed-{number}'}"
                if trial.wrong
                else "same bits"
            )
            print0(
                f"{self.tally['faults']:4d} faults | {name}: {', '.join(trial.story) or 'no fault in time'}: {verdict}"
            )
        return trial.tally["faults"]

    def new_base(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "base", self.folder / name, dirs_exist_ok=True))


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    """A corpus of the project's own sources, a tokenizer in `<folder>/base`, and (a policy, its schedule), untrained."""
    corpus = folder / "corpus"
    corpus.mkdir()
    text = "".join(path.read_text() for path in sorted((Path(__file__).parents[2] / "nanochat").glob("*.py")))[:120_000]
    lines = [json.dumps({"text": text[i : i + 400]}) + "\n" for i in range(0, len(text), 400)]
    (corpus / "sources.jsonl").write_text("".join(lines))
    made = subprocess.run(
        [sys.executable, "-m", "scripts.tok_train", "--preset", "smoke", "--data", str(corpus)],
        text=True,
        capture_output=True,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(folder / "base")},
    )
    if made.returncode:
        raise UserError(f"no tokenizer: {made.stderr.strip().splitlines()[-1]}")
    policy = GaussianPolicy(seed=1, initial_log_std=-1.0)
    save_policy(policy, folder / "policy", {})
    save_schedule(export_schedule(policy, [0.0, 0.3, 0.6]), folder / "schedule.json")
    return corpus, [folder / "policy", folder / "schedule.json"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, help="stop after so many; default: 100, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, help="begin no new run after so long")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the runs; a wrong one lists them")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.jobs < 1 or args.faults is not None and args.faults < 1 or args.minutes is not None and args.minutes <= 0:
        raise UserError("--faults, --minutes and --jobs must be above 0")

    begin, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    limit = math.inf if args.minutes is not None else 100
    soak = Soak(
        folder, args.only, args.seed, limit if args.faults is None else args.faults, 60 * (args.minutes or math.inf)
    )
    tally = soak.run(args.jobs)

    kinds = [
        f"{name} {number}"
        for name, number in sorted(tally.items())
        if name not in ("faults", "recoveries", "runs compared", *FAILURES)
    ]
    print0(f"faults: {', '.join(kinds)}")
    print0(
        f"tries {tally['faults']}, recoveries {tally['recoveries']}, runs compared {tally['runs compared']}, mismatches "
        f"{tally['mismatches']}, steps lost beyond the last checkpoint {tally['steps lost']}, hangs {tally['hangs']}, other failures "
        f"{tally['other failures']}, {format_seconds(time.monotonic() - begin)}"
    )
    if failed := any(tally[kind] for kind in FAILURES):
        print0(f"FAILED; what the runs left is in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    run_main(main, JelError)
