"""The record of a run: config.json, log.jsonl, result.json, and wandb where it is wanted."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanochat.common import Compute, need
from nanochat.files import atomic_file, write_json


def environment_record(compute: Compute) -> dict:
    """The command, versions, git commit and device of this process, for `config.json`."""
    describe, folder = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        commit = subprocess.run(describe, cwd=folder, text=True, capture_output=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    name = torch.cuda.get_device_name(compute.device) if compute.is_cuda else platform.processor() or platform.machine()
    script = getattr(
        sys.modules["__main__"].__spec__, "name", None
    )  # the module's name: a path has no meaning elsewhere
    command = ["python", "-m", script, *sys.argv[1:]] if script else [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "device": name,
        "world_size": compute.world_size,
        "threads": torch.get_num_threads(),
    }


MEASURED = {"dt", "tokens_per_second", "mfu", "peak_memory_mb"}  # of a step's record: these differ from run to run


class NullLogger:
    """Stands in for a wandb run: the same two methods, doing nothing."""

    def log(self, values: dict) -> None: ...

    def finish(self) -> None: ...


def wandb_logger(name: str, config: dict, project: str = "nanochat"):
    """A wandb run called `name`, or a `NullLogger` for `""` and `"dummy"` (off). Raises `UserError` without wandb."""
    if name in ("", "dummy"):
        return NullLogger()
    return need("wandb", f"--run {name}").init(project=project, name=name, config=config)


class RunLog:
    """A run's folder: `config.json` once, a line of `log.jsonl` per call, `result.json` at the end.

    Only rank 0 writes. On resume, lines past the resumed step are dropped, so that the log reads as if the run had
    never stopped; of the events (`recovery`: 1, 2, ...), those that come after the first `recoveries`.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        compute: Compute,
        resume_step: int | None = None,
        recoveries: int = 0,
        wandb_name: str = "",
    ):
        self.folder, self.active = folder, compute.is_main
        self._wandb = NullLogger()
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        self._keep(-1 if resume_step is None else resume_step, recoveries)
        write_json(folder / "config.json", {"environment": environment_record(compute), **config})
        self._wandb = wandb_logger(wandb_name, config)
        self._file = open(self._path, "a", buffering=1)

    def log(self, **record) -> None:
        if self.active:
            self._file.write(json.dumps(record) + "\n")
            self._wandb.log(record)

    def rewind(self, step: int) -> None:
        """Drop the records from `step` on, but for events: the run has gone back there."""
        if self.active:
            self._file.close()
            self._keep(step, math.inf)
            self._file = open(self._path, "a", buffering=1)

    def _keep(self, step: int, recoveries: float) -> None:
        lines = [
            json.dumps(r) + "\n"
            for r in read_log(self.folder)
            if (r["recovery"] <= recoveries if "recovery" in r else r["step"] < step)
        ]
        with atomic_file(self._path) as f:
            f.write("".join(lines).encode())

    def finish(self, **result) -> None:
        if self.active:
            write_json(self.folder / "result.json", result)
            self._file.close()
            self._wandb.finish()


def read_log(folder: Path) -> list[dict]:
    """The records of `log.jsonl`, up to the first malformed line: a killed run may leave half a line at the end."""
    path, records = Path(folder) / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (isinstance(record, dict) and type(record.get("step")) is type(record.get("recovery", 0)) is int):
            break
        records.append(record)
    return records


class Stopwatch:
    """Seconds left, from the steps done since the start (the first `skip` are warm-up and do not count)."""

    def __init__(self, total: int, done: int = 0, skip: int = 1):
        self.total, self.start, self.skip, self.t0 = total, done, skip, None

    def tick(self, done: int) -> float | None:
        """Call after each step; returns seconds left, or None while they are not known yet."""
        if self.t0 is None:
            if done - self.start >= self.skip:
                self.t0, self.start = time.perf_counter(), done
            return None
        return (time.perf_counter() - self.t0) / (done - self.start) * (self.total - done)


def without_compilation(seconds: list[float], compiles: bool) -> float:
    """The updates' seconds in total, the first charged at the mean of the others where it `compiles`, if there are any.

    >>> without_compilation([60.0, 2.0, 4.0], compiles=True), without_compilation([60.0, 2.0, 4.0], compiles=False)
    (9.0, 66.0)
    """
    if not compiles or len(seconds) < 2:
        return sum(seconds)
    return sum(seconds[1:]) * len(seconds) / (len(seconds) - 1)


def format_seconds(seconds: float | None) -> str:
    """`75 -> '1m15s'`, None -> '?'."""
    if seconds is None:
        return "?"
    minutes, s = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{s:02d}s" if minutes else f"{s}s"
