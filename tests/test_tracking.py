"""The logger: the same keys everywhere, and a resumed run goes on where it was. Services are the real ones, offline."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jel import JelError
from jel.tracking import Tracker, flat_record, read_records

MULTIPLIERS = {"*": {"lr": 2.0, "weight_decay": 0.5}, "head": {"lr": 3.0}}
EXPECTED = {"train/loss": 1.5, "val/loss": 2.5, "jel/all/lr": 2.0, "jel/all/weight_decay": 0.5, "jel/head/lr": 3.0}


def log_steps(tracker: Tracker, steps) -> None:
    for step in steps:
        tracker.log(step, loss=step + 0.5, val_loss=step + 1.5, multipliers=MULTIPLIERS)


@pytest.fixture
def figure():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, 1])
    return drawn


def test_keys():
    record = {"step": 3, "loss": 1.5, "val_loss": 2.5, "multipliers": MULTIPLIERS, "event": "text", "done": True}
    assert flat_record({**record, "returns": [1.0], "reward": None}) == EXPECTED
    assert flat_record({"step": 3, **EXPECTED}) == EXPECTED  # what a tracker has written reads the same


def test_jsonl_is_resumed_without_the_steps_that_are_taken_again(tmp_path):
    with Tracker(tmp_path) as tracker:
        log_steps(tracker, range(5))
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "train/lo')  # the process was killed here
    with Tracker(tmp_path, resume_step=3) as tracker:
        log_steps(tracker, range(3, 6))
    records = read_records(tmp_path)
    assert [r["step"] for r in records] == list(range(6))
    assert records[1] == {"step": 1, **EXPECTED}
    with Tracker(tmp_path) as tracker:
        tracker.log(0, loss=float("inf"))
    assert read_records(tmp_path) == [{"step": 0, "train/loss": None}]  # afresh; and never a line that is not JSON


def test_a_picture_is_saved(tmp_path, figure):
    with Tracker(tmp_path, total_steps=7, config={"lr": 1e-3, "path": tmp_path}) as tracker:
        tracker.figure(2, "jel/multipliers", figure)
    assert (tmp_path / "figures" / "jel_multipliers.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "tracking.json").read_text())["config"]
    assert config == {"lr": 1e-3, "path": str(tmp_path), "total_steps": 7}


def test_other_ranks_write_nothing(tmp_path):
    with Tracker(tmp_path / "run", active=False) as tracker:
        log_steps(tracker, range(2))
    assert not (tmp_path / "run").exists()


def test_bad_places_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(JelError, match="cannot track to 'stone'; there are jsonl, tensorboard, wandb, mlflow"):
        Tracker(tmp_path / "run", ("jsonl", "stone"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(JelError, match="pip install wandb"):
        Tracker(tmp_path / "run", ("jsonl", "wandb"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(JelError, match="no log to read"):
        read_records(tmp_path)


def test_importing_jel_imports_no_service():
    services = "{'wandb', 'mlflow', 'tensorboard', 'matplotlib'}"
    code = f"import jel, jel.tracking, jel.watch, sys; print({services} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_tensorboard_files(tmp_path, figure):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, "tensorboard") as tracker:
        log_steps(tracker, range(4))
    with Tracker(tmp_path, "tensorboard", resume_step=2) as tracker:
        log_steps(tracker, range(2, 6))
        tracker.figure(5, "multipliers", figure)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(EXPECTED) and events.Tags()["images"] == ["multipliers"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(i, i + 0.5) for i in range(6)]


def test_wandb_resumes_its_run(tmp_path, figure, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, log = [], wandb.Run.log

    def spy(run, values):
        logged.append((run.id, values))
        log(run, values)

    monkeypatch.setattr(wandb.Run, "log", spy)
    for first, last in ((0, 3), (2, 4)):
        with Tracker(tmp_path, ("wandb", "jsonl"), name="mine", config={"a": 1}, resume_step=first or None) as tracker:
            log_steps(tracker, range(first, last))
            tracker.figure(last, "multipliers", figure)
    ids = {run_id for run_id, _ in logged}
    assert len(ids) == 1 and ids == set(json.loads((tmp_path / "tracking.json").read_text())["run_ids"].values())
    numbers = [values for _, values in logged if "train/loss" in values]
    assert [n["step"] for n in numbers] == [0, 1, 2, 2, 3] and numbers[1] == {"step": 1, **EXPECTED}
    assert sum(isinstance(values.get("multipliers"), wandb.Image) for _, values in logged) == 2
    with Tracker(tmp_path, "wandb") as tracker:
        assert tracker.sinks["wandb"].run_id not in ids  # afresh is another run


def test_mlflow_resumes_its_run(tmp_path, figure, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for first, last in ((0, 3), (2, 4)):
        with Tracker(tmp_path / "run", "mlflow", config={"a": 1}, resume_step=first or None) as tracker:
            log_steps(tracker, range(first, last))
            run_id = tracker.sinks["mlflow"].run_id
    client = MlflowClient()
    assert client.get_run(run_id).data.params == {"a": "1"} and client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.metrics == {**EXPECTED, "train/loss": 3.5, "val/loss": 4.5}
    assert sorted({m.step for m in client.get_metric_history(run_id, "jel/all/lr")}) == [0, 1, 2, 3]
