"""Kill, damage and starve training runs at random moments, resume them, and compare them with undisturbed ones.

    python -m scripts.soak --faults 100               stops after 100 faults
    python -m scripts.soak --minutes 60 --seed 7      starts new runs for an hour, with other random choices

Real processes at smoke size: base_train with each optimizer and kind of controller, meta_train and a sweep, on one rank
and on two. After every fault the same command is given again; in the end weights, log and result must equal, bit for
bit, those of a run without faults. Exit status 1 if they do not. Writes to a temporary folder only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
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
from scripts.soak.faults import small_disk
from scripts.soak.runs import run_specs
from scripts.soak.trial import FAILURES, Trial


class Soak:
    """Trials of all runs in turn, `jobs` at a time, until there were `faults`, or `seconds` have passed."""

    def __init__(self, folder: Path, names: list[str], seed: int, faults: float, seconds: float):
        self.folder, self.seed, self.faults_left, self.end = folder, seed, faults, time.monotonic() + seconds
        self.tally, self.lock, self.numbers = Counter(), threading.Lock(), count()
        corpus, files = prepare(folder)
        every = run_specs(corpus, *files)
        if unknown := set(names) - every.keys():
            raise UserError(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(every)}")
        self.specs = {name: spec for name, spec in every.items() if not names or name in names}
        self.max_faults = math.ceil(min(faults, 1000) / len(self.specs))  # of a trial: few faults reach every run too

    def run(self, jobs: int) -> Counter:
        """Run everything; returns the counts of faults, resumes, comparisons and failures."""
        with ThreadPoolExecutor(jobs) as pool:
            references = {name: pool.submit(self.reference, name) for name in self.specs}
            self.expected = {name: future.result() for name, future in references.items()}
            print0(f"{len(self.expected)} undisturbed runs done: {', '.join(self.expected)}")
            for future in [pool.submit(self.trials) for _ in range(jobs)]:
                future.result()
        return self.tally

    def reference(self, name: str) -> dict:
        """The outcome of the run without faults."""
        trial = Trial(self.specs[name], self.new_base(f"undisturbed-{name}"), random.Random())
        found = trial.run()
        if found is None:
            reasons = "; ".join(trial.failures)
            raise UserError(f"the undisturbed run {name} failed ({reasons}); its output is in {trial.base}.txt")
        return found

    def trials(self) -> None:
        """Trials one after another, in one of the threads, while there are faults left."""
        while time.monotonic() < self.end:
            with self.lock:
                number = next(self.numbers)
                rng = random.Random(derive_seed(self.seed, "trial", number))
                most = min(rng.randint(3, 7), self.max_faults, self.faults_left)
                self.faults_left -= most
            if not most:
                return
            name = list(self.specs)[number % len(self.specs)]
            injected = self.trial(number, name, rng, most)
            with self.lock:
                self.faults_left += most - injected

    def trial(self, number: int, name: str, rng: random.Random, most: int) -> int:
        """One trial, compared with the run without faults and reported in one line; returns its number of faults."""
        spec, folder = self.specs[name], self.folder / f"trial-{number}"
        with small_disk(folder) if spec.limited_disk else contextlib.nullcontext(False) as mounted:
            trial = Trial(spec, self.new_base(f"trial-{number}"), rng, most, mounted)
            found, expected = trial.run(), self.expected[name]
            if found is not None and (differing := [key for key in expected if found.get(key) != expected[key]]):
                trial.fail(f"differs from the undisturbed run: {', '.join(differing)}", "mismatches")
            failed = self.folder / f"failed-{number}"
            if trial.failures:
                shutil.copytree(trial.base, failed, symlinks=True)
        shutil.rmtree(folder)
        trial.tally["runs compared"] += found is not None
        verdict = f"FAILED, {'; '.join(trial.failures)}; see {failed}" if trial.failures else "same bits"
        events = ", ".join(trial.events) or "no fault in time"
        with self.lock:
            self.tally += trial.tally
            print0(f"{self.tally['faults']:4d} faults | {name}: {events}: {verdict}")
        return trial.tally["faults"]

    def new_base(self, name: str) -> Path:
        return Path(shutil.copytree(self.folder / "base", self.folder / name, dirs_exist_ok=True))


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    """Make a corpus of the project's sources, and a tokenizer of it in `<folder>/base`.

    Returns the corpus, and the files of an untrained policy and of its exported schedule.
    """
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
        raise UserError(f"the tokenizer was not trained: {made.stderr.strip().splitlines()[-1]}")
    policy = GaussianPolicy(seed=1, initial_log_std=-1.0)
    save_policy(policy, folder / "policy", {})
    save_schedule(export_schedule(policy, [0.0, 0.3, 0.6]), folder / "schedule.json")
    return corpus, [folder / "policy", folder / "schedule.json"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, help="stop after so many; default: 100, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, help="start no new run after so many")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these runs; a wrong name lists all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.jobs < 1 or args.faults is not None and args.faults < 1 or args.minutes is not None and args.minutes <= 0:
        raise UserError("--faults, --minutes and --jobs must be above 0")
    return args


def main() -> int:
    args, begin, folder = parse(), time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    faults = args.faults if args.faults is not None else 100 if args.minutes is None else math.inf
    tally = Soak(folder, args.only, args.seed, faults, 60 * (args.minutes or math.inf)).run(args.jobs)

    totals = ("faults", "resumes", "runs compared", *FAILURES)
    kinds = [f"{name} {number}" for name, number in sorted(tally.items()) if name not in totals]
    print0(f"faults by kind: {', '.join(kinds)}")
    print0("total: " + ", ".join(f"{name} {tally[name]}" for name in totals), end="")
    print0(f", time {format_seconds(time.monotonic() - begin)}")
    if failed := any(tally[kind] for kind in FAILURES):
        print0(f"FAILED; the files of the failed runs are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    run_main(main, JelError)
