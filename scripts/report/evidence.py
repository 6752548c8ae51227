"""What the runs of a preset hold: read once, then plain data for the tables, the figures and `results.json`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.files import read_json
from nanochat.run_log import read_log
from scripts.sweep.settings import METHODS, SWEEPS

LABELS = {
    "hand_tuned": "Hand-tuned",
    "jel": "JEL",
    "best_constant": "Best constant",
    "schedule_free": "Schedule-free",
    "suboptimal": "Suboptimal",
}
assert tuple(LABELS) == METHODS
RUN_NAME = re.compile(r"(?P<method>.+)-s(?P<seed>\d+)")
SECTIONS = ("ablations", "equal_budget", "transfer")  # tables of rows that scripts.ablate writes


@dataclass(frozen=True)
class Run:
    """A finished run: what its folder holds, and its validation bits per byte by step."""

    config: dict
    result: dict
    curve: dict[int, float]


@dataclass(frozen=True)
class MetaTraining:
    """One seed's meta-training. `updates` are its log's records; `result` is empty while it is not finished."""

    config: dict
    updates: list[dict]
    result: dict


@dataclass(frozen=True)
class Evidence:
    """All that the folder of a preset's runs holds. What is not there is None or empty."""

    preset: str
    runs: dict[str, dict[int, Run]]  # finished ones, by method and seed
    unfinished: dict[str, int]  # run -> steps done
    sweeps: dict[str, dict]  # by the names of --what: {"rows": [...], "best": index or None}
    meta: dict[int, MetaTraining]  # by seed
    sections: dict[str, list[dict]]  # of SECTIONS, those that were measured

    def results(self, method: str, key: str) -> dict[int, float]:
        """One number of the method's results by seed, where it was measured."""
        by_seed = sorted(self.runs.get(method, {}).items())
        return {seed: run.result[key] for seed, run in by_seed if run.result.get(key) is not None}

    def methods(self) -> list[str]:
        """The five of Table 1, measured or not, then others that were run."""
        return [*LABELS, *sorted(self.runs.keys() - LABELS.keys())]

    def configs(self) -> list[dict]:
        return [run.config for by_seed in self.runs.values() for run in by_seed.values()]

    def best_row(self, method: str) -> dict | None:
        """The best setting of the method's sweeps by validation; None if there is none."""
        sweeps = [self.sweeps[what] for what in SWEEPS.get(method, ()) if what in self.sweeps]
        rows = [row for sweep in sweeps for row in sweep["rows"] if row["val_bpb"] is not None]
        return min(rows, key=lambda row: row["val_bpb"], default=None)

    def curves(self) -> dict[str, list[dict[int, float]]]:
        """The curves that can be drawn, one a seed. A method that diverged stands in Table 1, not on a scale."""
        curves = {method: [run.curve for run in by_seed.values()] for method, by_seed in self.runs.items()}
        return {
            method: runs
            for method, runs in curves.items()
            if set.intersection(*map(set, runs)) and all(math.isfinite(v) for run in runs for v in run.values())
        }


# -----------------------------------------------------------------------------
# reading


def read_evidence(runs_dir: Path, preset: str) -> Evidence:
    """Everything under `runs/<preset>/`. Raises `UserError` if nothing is there, or a file is not what it should be."""
    folder = runs_dir / preset
    runs, unfinished, meta = {}, {}, {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = RUN_NAME.fullmatch(path.name)
        if not name or not (path / "config.json").exists():
            continue
        if name["method"] == "meta":
            meta[int(name["seed"])] = read_meta(path)
        elif (path / "result.json").exists():
            runs.setdefault(name["method"], {})[int(name["seed"])] = read_run(path)
        else:
            unfinished[path.name] = sum("loss" in record for record in read_log(path))
    sweeps = {}
    for what in (what for sweeps_of_a_method in SWEEPS.values() for what in sweeps_of_a_method):
        path = folder / f"sweep_{what.replace('-', '_')}.json"
        if path.exists():
            sweeps[what] = checked(path, "rows", "best")
            settings = ("lr", "wd", "warmup") if what.startswith("schedule-free") else ()
            checked_rows(sweeps[what]["rows"], str(path), *settings, *("val_bpb", "seconds", "tokens", "flops"))
    found = {name: folder / "evidence" / f"{name}.json" for name in SECTIONS}
    sections = {
        name: checked_rows(read_json(path), str(path), "name", "test_bpb", "run_equivalents", "verdict")
        for name, path in found.items()
        if path.exists()
    }
    if not (runs or unfinished or sweeps or meta or sections):
        raise UserError(f"{folder} holds no runs of preset {preset}; run `bash speedrun.sh --preset {preset}` first")
    return Evidence(preset, runs, unfinished, sweeps, dict(sorted(meta.items())), sections)


def read_run(path: Path) -> Run:
    numbers = ("val_bpb", "test_bpb", "train_loss", "seconds", "core_seconds", "flops", "tokens", "recoveries")
    result = checked(path / "result.json", *numbers)
    config = checked(path / "config.json", "environment", "flags", "model", "parameters", "data", "num_iterations")
    return Run(config, result, {r["step"]: r["val_bpb"] for r in read_log(path) if "val_bpb" in r})


def read_meta(path: Path) -> MetaTraining:
    config, result = checked(path / "config.json", "environment", "flags", "data"), {}
    if (path / "result.json").exists():
        result = checked(path / "result.json", "updates", "episodes", "flops", "core_seconds", "seconds", "policy")
    keys = ("entropy", "return_mean", "return_best", "decision_progress", "multipliers")
    return MetaTraining(config, checked_rows(read_log(path), str(path / "log.jsonl"), *keys), result)


def checked(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys; `UserError` if it does not."""
    return with_keys(read_json(path), str(path), *keys)


def checked_rows(rows, where: str, *keys: str) -> list[dict]:
    if not isinstance(rows, list):
        raise UserError(f"{where} does not hold a list of rows; delete it and run its stage again")
    return [with_keys(row, f"{where}, row {i}", *keys) for i, row in enumerate(rows)]


def with_keys(record, where: str, *keys: str) -> dict:
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; delete it and run its stage again")
    return record
