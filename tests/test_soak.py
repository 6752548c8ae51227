"""The soak test in short, and that it would notice."""

from __future__ import annotations

import random
import re
import sys
from itertools import count

import torch

from nanochat.checkpoint import load_checkpoint, save_checkpoint
from scripts.soak import __main__ as soak
from scripts.soak import faults as soak_faults


def run(monkeypatch, capsys, *flags):
    """(exit status, the last line's numbers by name, all that was printed)."""
    monkeypatch.setattr(sys, "argv", ["soak", *flags])
    code, printed = soak.main(), capsys.readouterr().out
    numbers = re.findall(r"([a-z ]+) (\d+),", printed[printed.rindex("tries ") :])
    return code, {name.strip(): int(number) for name, number in numbers}, printed


def test_a_short_soak_ends_without_a_loss(monkeypatch, capsys):
    every = soak.faults
    monkeypatch.setattr(
        soak, "faults", lambda subject: [soak_faults.kill_a_rank] if subject.ranks > 1 else every(subject)
    )
    monkeypatch.setattr(soak_faults, "STEPS", 24)
    code, told, printed = run(monkeypatch, capsys, "--faults", "3", "--only", "two ranks", "full disk", "--seed", "3")
    assert code == 0 and told["tries"] == 3 and told["runs compared"] >= 2, printed
    assert (
        told["mismatches"]
        == told["steps lost beyond the last checkpoint"]
        == told["hangs"]
        == told["other failures"]
        == 0
    )
    assert "SIGKILL of one rank" in printed


class Finished:
    """In place of a process: over at once."""

    pid = returncode = 0

    def __init__(self, *_):
        self.process = self

    def poll(self):
        return 0

    def wait(self):
        return 0

    def ended(self):
        return True

    def said(self):
        return "resumed at step 3"

    def steps(self):
        return 0


def test_a_difference_is_a_failure(monkeypatch, capsys, tmp_path):
    left = count()
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(soak, "prepare", lambda folder: (tmp_path, [tmp_path, tmp_path]))
    monkeypatch.setattr(soak.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(soak, "Life", Finished)
    monkeypatch.setattr(soak, "remains", lambda *_: {"weights": next(left)})
    monkeypatch.setattr(soak, "await_moment", lambda *_: "")
    monkeypatch.setattr(soak.Soak, "lane", lambda self: self.trial(0, "meta", random.Random(0), 0))
    code, told, printed = run(monkeypatch, capsys, "--only", "meta", "--jobs", "1")
    assert code == 1 and told["mismatches"] == 1 and "FAILED, not what the undisturbed run left: weights" in printed


def test_a_step_back_behind_a_whole_checkpoint_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "Life", Finished)
    monkeypatch.setattr(soak, "remains", lambda *_: {})
    save_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 5, {"w": torch.zeros(3)})
    trial = soak.Trial(soak_faults.Subject("base_train", []), tmp_path, random.Random(0))
    assert (
        trial.run() is None and trial.wrong == ["resumed at 3, though 5 was saved"] and trial.tally["steps lost"] == 2
    )


def test_damage_is_always_noticed(tmp_path):
    """Whatever is truncated, flipped or removed: the checkpoint before is used."""
    for seed in range(60):
        folder = tmp_path / str(seed)
        for step in (1, 2):
            save_checkpoint(folder, step, {"w": torch.arange(5.0), "step": step})
        soak_faults.damage(folder / "step_00000002", random.Random(seed))
        step, state = load_checkpoint(folder)
        assert step == state["step"] == 1


def test_no_room_is_told_and_then_given_back(tmp_path):
    life = soak_faults.Life.__new__(soak_faults.Life)
    life.base = tmp_path / "disk"
    with soak_faults.small_disk(life.base) as mounted:
        if mounted:  # else this may not mount one, and a soak limits the size of files instead
            with soak_faults.no_room(life, mounted) as how:
                assert how == "full tmpfs" and soak.shutil.disk_usage(life.base).free < 2**12
            assert soak.shutil.disk_usage(life.base).free > 2**23
    assert not any(life.base.iterdir())
