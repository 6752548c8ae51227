"""Where a run's numbers go: JSONL, TensorBoard, wandb and MLflow behind one class.

    with Tracker("runs/mine", ("jsonl", "wandb"), config={"lr": 1e-3}, total_steps=1000) as tracker:
        tracker.log(step, loss=loss.item(), multipliers=scheduler.multipliers)

Every service sees the same keys: `train/<name>`, `val/<name>` and `jel/<group>/<knob>`, where the group "*" of a
schedule is called `all`. Each is imported when it is asked for, and not before.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from jel.errors import JelError
from jel.files import json_bytes, write_files

LOG, ABOUT = "log.jsonl", "tracking.json"


def flat_record(record: Mapping[str, Any]) -> dict[str, float]:
    """A record of any run's log, as numbers under the keys above; what is no number, and what is no news, is left out.

    A plain name belongs to training, `val_x` and `test_x` to the splits, and `multipliers` may be nested by group and
    knob. Lists (the decisions of a meta-training record) are left out.
    """
    flat: dict[str, float] = {}
    for key, value in record.items():
        if key == "multipliers" and isinstance(value, Mapping):
            for group, own in value.items():
                flat |= {f"jel/{'all' if group == '*' else group}/{knob}": m for knob, m in own.items()}
        elif key == "step":
            continue
        elif "/" in key:
            flat[key] = value
        elif key.startswith(("val_", "test_")):
            flat["/".join(key.split("_", 1))] = value
        else:
            flat[f"train/{key}"] = value
    return {key: float(v) for key, v in flat.items() if isinstance(v, Real) and not isinstance(v, bool)}


def read_records(run: str | Path) -> list[dict]:
    """The records of a run's `log.jsonl` (`run`: its folder, or the file), up to the first malformed line.

    A killed run may leave half a line at the end. Raises `JelError` if there is no such file.
    """
    path = Path(run)
    path = path / LOG if path.is_dir() else path
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise JelError(f"no log to read at {path} ({e.strerror})") from None
    records: list[dict] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


class Sink(Protocol):
    """One place that numbers go to. `run_id`: what finds the same run again, where the service has such a thing."""

    run_id: str | None

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def figure(self, step: int, name: str, figure: Any) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes a run's numbers and figures to every place named in `to`: "jsonl", "tensorboard", "wandb", "mlflow".

    `folder`: the run's own; JSONL and TensorBoard files, figures, and `tracking.json` with the services' run ids lie
    there. `resume_step`: the first step that is yet to come when a run goes on. What was logged from it on is dropped
    where that is possible, and the same wandb and MLflow runs go on. None starts afresh. `active`: False on all ranks
    but one. Raises `JelError` for an unknown place, or a package that is not installed, before anything is written.
    """

    def __init__(
        self,
        folder: str | Path,
        to: Sequence[str] = ("jsonl",),
        *,
        project: str = "jel",
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        resume_step: int | None = None,
        active: bool = True,
    ):
        to = (to,) if isinstance(to, str) else tuple(to)
        if unknown := [place for place in to if place not in SINKS]:
            raise JelError(f"cannot track to {', '.join(map(repr, unknown))}; there are {', '.join(SINKS)}")
        self.folder, self.sinks = Path(folder), dict[str, Sink]()
        if not active:
            return
        about = self._about() if resume_step is not None else {}
        config = {**(config or {}), **({} if total_steps is None else {"total_steps": total_steps})}
        for place in to:
            _import(place)
        self.folder.mkdir(parents=True, exist_ok=True)
        for place in sorted(
            to, key=lambda place: place == "jsonl"
        ):  # last: only when all else works are records dropped
            run_id = about.get("run_ids", {}).get(place)
            self.sinks[place] = SINKS[place](
                self.folder, project, name or self.folder.name, config, run_id, resume_step
            )
        run_ids = {place: sink.run_id for place, sink in self.sinks.items() if sink.run_id}
        write_files({self.folder / ABOUT: json_bytes({"config": _plain(config), "run_ids": run_ids})})

    def log(self, step: int, multipliers: Mapping[str, Mapping[str, float]] | None = None, **values: Any) -> None:
        """Numbers of a step: `loss=` goes to `train/loss`, `val_loss=` to `val/loss`, and the multipliers by group."""
        values = {name: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for name, v in values.items()}
        flat = flat_record(values if multipliers is None else {**values, "multipliers": multipliers})
        for sink in self.sinks.values():
            sink.log(int(step), flat)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """A matplotlib `Figure` of a step, uploaded where the place shows pictures; a PNG in the folder `figures`."""
        for sink in self.sinks.values():
            sink.figure(int(step), name, figure)

    def close(self) -> None:
        for sink in self.sinks.values():
            sink.close()
        self.sinks = {}

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _about(self) -> dict:
        try:
            about = json.loads((self.folder / ABOUT).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return about if isinstance(about, dict) and isinstance(about.get("run_ids"), dict) else {}


# -----------------------------------------------------------------------------
# the places


class _Jsonl:
    run_id = None

    def __init__(self, folder: Path, project: str, name: str, config: dict, run_id: str | None, resume: int | None):
        self.folder, path = folder, folder / LOG
        kept = [r for r in read_records(path) if r["step"] < resume] if resume and path.exists() else []
        write_files({path: "".join(json.dumps(r) + "\n" for r in kept).encode()})
        self._file = open(path, "a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        known = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}) + "\n")

    def figure(self, step: int, name: str, figure: Any) -> None:
        _saved(self.folder, name, figure)

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    run_id = None

    def __init__(self, folder: Path, project: str, name: str, config: dict, run_id: str | None, resume: int | None):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        self._writer.add_figure(name, figure, step, close=False)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A resumed run goes on under its id. The step is a value of its own, so that it may fall back on a resume."""

    def __init__(self, folder: Path, project: str, name: str, config: dict, run_id: str | None, resume: int | None):
        import wandb

        self._wandb, self.folder = wandb, folder
        options: dict[str, Any] = {"id": run_id, "resume": "allow"} if run_id else {}
        options |= {"project": project, "name": name, "dir": str(folder)}
        self._run = wandb.init(config=config, reinit="create_new", **options)
        self.run_id: str | None = self._run.id
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def figure(self, step: int, name: str, figure: Any) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(_saved(self.folder, name, figure)))})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """To the server that `MLFLOW_TRACKING_URI` names, by MLflow's own rules."""

    def __init__(self, folder: Path, project: str, name: str, config: dict, run_id: str | None, resume: int | None):
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run_id is None:
            experiment = self._client.get_experiment_by_name(project)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            for key, value in config.items():
                self._client.log_param(run_id, key, value)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id: str | None = run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._client.log_metric(self.run_id, key, value, step=step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        self._client.log_figure(self.run_id, figure, f"{name}.png")

    def close(self) -> None:
        self._client.set_terminated(self.run_id)


SINKS: dict[str, Any] = {"jsonl": _Jsonl, "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}


def _saved(folder: Path, name: str, figure: Any) -> Path:
    """The path of the figure as PNG, in the run's folder."""
    path = folder / "figures" / f"{name.replace('/', '_')}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return path


def _import(place: str) -> None:
    """Raise `JelError` if what the place needs is not installed."""
    module = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}.get(place)
    try:
        if module:
            importlib.import_module(module)
    except ImportError as e:
        package = "mlflow-skinny" if module == "mlflow" else module
        raise JelError(f"tracking to {place} needs a package that is not installed: pip install {package} ({e})") from e


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON values."""
    return json.loads(json.dumps(config, default=str))
