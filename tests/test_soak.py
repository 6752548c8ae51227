"""A short soak test, and proof that it reports differences, lost steps and damage."""

from __future__ import annotations

import random
import re
import sys
from itertools import count

import torch

from nanochat.checkpoint import load_checkpoint, save_checkpoint
from scripts.soak import __main__ as soak
from scripts.soak import faults, runs, trial


def run(monkeypatch, capsys, *flags):
    """(exit status, the totals by name, all that was printed)."""
    monkeypatch.setattr(sys, "argv", ["soak", *flags])
    code, printed = soak.main(), capsys.readouterr().out
    numbers = re.findall(r"([a-z ]+) (\d+),", printed[printed.rindex("total: ") + len("total:") :])
    return code, {name.strip(): int(number) for name, number in numbers}, printed


def test_a_short_soak_ends_without_a_loss(monkeypatch, capsys):
    every = faults.faults_for
    monkeypatch.setattr(trial, "faults_for", lambda spec: [faults.kill_rank] if spec.ranks > 1 else every(spec))
    monkeypatch.setattr(runs, "STEPS", 24)
    code, totals, printed = run(monkeypatch, capsys, "--faults", "3", "--only", "two ranks", "full disk", "--seed", "3")
    assert code == 0 and totals["faults"] == 3 and totals["runs compared"] >= 2, printed
    assert [totals[kind] for kind in trial.FAILURES] == [0, 0, 0, 0]
    assert "SIGKILL of one rank" in printed


class FinishedProcess:
    """Stands in for a `RunProcess`: it has ended."""

    pid = returncode = 0

    def __init__(self, *_):
        self.process = self

    def poll(self):
        return 0

    def wait(self):
        return 0

    def ended(self):
        return True

    def output(self):
        return "resumed at step 3"

    def steps(self):
        return 0


def test_a_difference_is_a_failure(monkeypatch, capsys, tmp_path):
    left = count()
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(soak, "prepare", lambda folder: (tmp_path, [tmp_path, tmp_path]))
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(trial, "RunProcess", FinishedProcess)
    monkeypatch.setattr(trial, "outcome", lambda *_: {"weights": next(left)})
    monkeypatch.setattr(soak.Soak, "trials", lambda self: self.trial(0, "meta", random.Random(0), 0))
    code, totals, printed = run(monkeypatch, capsys, "--only", "meta", "--jobs", "1")
    assert code == 1 and totals["mismatches"] == 1 and "FAILED, differs from the undisturbed run: weights" in printed


def test_resuming_before_the_newest_whole_checkpoint_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(trial, "RunProcess", FinishedProcess)
    monkeypatch.setattr(trial, "outcome", lambda *_: {})
    save_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 5, {"w": torch.zeros(3)})
    disturbed = trial.Trial(runs.RunSpec("base_train", []), tmp_path, random.Random(0))
    assert disturbed.run() is None and disturbed.tally["steps lost"] == 2
    assert disturbed.failures == ["resumed at 3, though 5 was saved"]


def test_damage_is_always_detected(tmp_path):
    """Whatever is truncated, flipped or removed: the previous checkpoint is loaded."""
    for seed in range(60):
        folder = tmp_path / str(seed)
        for step in (1, 2):
            save_checkpoint(folder, step, {"w": torch.arange(5.0), "step": step})
        faults.damage(folder / "step_00000002", random.Random(seed))
        step, state = load_checkpoint(folder)
        assert step == state["step"] == 1


def test_the_small_disk_is_filled_and_freed_again(tmp_path):
    process = runs.RunProcess.__new__(runs.RunProcess)
    process.base = tmp_path / "disk"
    with faults.small_disk(process.base) as mounted:
        if mounted:  # otherwise this process may not mount one, and the soak test limits the size of files instead
            with faults.full_disk(process, mounted) as how:
                assert how == "full tmpfs" and soak.shutil.disk_usage(process.base).free < 2**12
            assert soak.shutil.disk_usage(process.base).free > 2**23
    assert not any(process.base.iterdir())
