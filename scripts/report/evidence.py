"""What the runs of a preset hold: read once, then plain data for the tables, the figures and `results.json`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.files import read_json
from nanochat.run_log import read_log
from scripts.report.statistics import ratio, summarize, total

LABELS = {"schedule_free": "Schedule-free", "jel": "JEL", "hand_tuned": "Hand-tuned", "suboptimal": "Suboptimal"}
RUN_NAME = re.compile(r"(?P<method>.+)-s(?P<seed>\d+)")


@dataclass(frozen=True)
class Run:
    """A finished run: what its folder holds, and its validation bits per byte by step."""

    config: dict
    result: dict
    curve: dict[int, float]


@dataclass(frozen=True)
class Evidence:
    """All that the folder of a preset's runs holds. What is not there is None or empty."""

    preset: str
    runs: dict[str, dict[int, Run]]  # finished ones, by method and seed
    unfinished: dict[str, int]  # run -> steps done
    sweeps: dict[str, dict]  # by method: {"rows": [...], "best": index or None}
    meta_config: dict | None
    updates: list[dict]  # meta-training's records, one an update
    meta_result: dict  # empty while meta-training is not finished
    ablations: list[dict]

    def results(self, method: str, key: str) -> dict[int, float]:
        """One number of the method's results, by seed."""
        return {seed: run.result[key] for seed, run in sorted(self.runs.get(method, {}).items())}

    def methods(self) -> list[str]:
        """The paper's four in the order of its Table 1, measured or not, then the others."""
        return [*LABELS, *sorted(self.runs.keys() - LABELS.keys())]

    def configs(self) -> list[dict]:
        return [run.config for by_seed in self.runs.values() for run in by_seed.values()]

    def curves(self) -> dict[str, list[dict[int, float]]]:
        """The curves that can be drawn, one a seed. A method that diverged has its place in Table 1, not on a scale."""
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
    runs, unfinished = {}, {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = RUN_NAME.fullmatch(path.name)
        if not name or not (path / "config.json").exists():
            continue
        if (path / "result.json").exists():
            runs.setdefault(name["method"], {})[int(name["seed"])] = read_run(path)
        else:
            unfinished[path.name] = sum("loss" in record for record in read_log(path))
    sweeps = {}
    for method, settings in {"schedule_free": ("lr", "wd", "warmup"), "hand_tuned": ()}.items():
        if (folder / f"sweep_{method}.json").exists():
            sweeps[method] = read_sweep(folder / f"sweep_{method}.json", settings, runs_dir)
    meta, meta_config, meta_result, ablations = folder / "meta", None, {}, []
    if (meta / "config.json").exists():
        meta_config = checked(meta / "config.json", "environment", "flags", "data")
    if meta_config and (meta / "result.json").exists():
        meta_result = checked(meta / "result.json", "updates", "episodes", "tokens", "seconds", "policy")
    if (folder / "ablations.json").exists():
        path = folder / "ablations.json"
        ablations = checked_rows(read_json(path), str(path), "what", "val_bpb")
    if not (runs or unfinished or sweeps or meta_config or ablations):
        raise UserError(f"{folder} holds no runs of preset {preset}; run `bash speedrun.sh --preset {preset}` first")
    return Evidence(preset, runs, unfinished, sweeps, meta_config, read_log(meta), meta_result, ablations)


def read_run(path: Path) -> Run:
    result = checked(path / "result.json", "val_bpb", "train_loss", "seconds", "tokens")
    config = checked(path / "config.json", "environment", "flags", "model", "parameters", "data", "num_iterations")
    return Run(config, result, {r["step"]: r["val_bpb"] for r in read_log(path) if "val_bpb" in r})


def read_sweep(path: Path, settings: tuple[str, ...], runs_dir: Path) -> dict:
    """A sweep's rows and best. A row that does not tell its tokens gets them from its run's folder, if there is one."""
    sweep = checked(path, "rows", "best")
    for row in checked_rows(sweep["rows"], str(path), *settings, "val_bpb", "seconds"):
        result = runs_dir / str(row.get("tag")) / "result.json"
        if "tokens" not in row and result.exists():
            row["tokens"] = checked(result, "tokens")["tokens"]
    return sweep


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


# -----------------------------------------------------------------------------
# costs


def run_cost(evidence: Evidence) -> dict[str, float | None]:
    """Tokens and seconds of one deployed run, the unit of "run equivalents": the mean of the JEL runs."""
    return {key: summarize(list(evidence.results("jel", key).values())).mean for key in ("tokens", "seconds")}


def meta_run_equivalents(evidence: Evidence) -> dict[str, float | None]:
    """What meta-training cost, in deployed runs, by tokens and by seconds; None where not measured."""
    return {key: ratio(evidence.meta_result.get(key), one) for key, one in run_cost(evidence).items()}


def controller_cost(evidence: Evidence) -> dict[str, float | None]:
    """Milliseconds a decision, and percent of the run's time, over all JEL runs; None where not measured."""
    results = [run.result for run in evidence.runs.get("jel", {}).values()]
    spent, decisions, seconds = (
        total([r.get(key) for r in results]) for key in ("controller_seconds", "decisions", "seconds")
    )
    return {
        "ms_per_decision": scaled(ratio(spent, decisions), 1000),
        "overhead_percent": scaled(ratio(spent, seconds), 100),
    }


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value
