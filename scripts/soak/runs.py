"""The runs that the soak test starts: their commands, one process of a run, and what a finished run leaves."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jel import OBSERVATIONS, Controller
from nanochat.run_log import MEASURED, read_log

TIMEOUT_SECONDS = 300.0  # one process that takes longer counts as hanging
POLL_SECONDS = 0.001
STEPS, UPDATES = 60, 8  # of a base_train run and of a meta_train run
TAG = "run"  # --model-tag
TIMING = {*MEASURED, "seconds", "core_seconds", "controller_seconds"}  # differ from run to run


class StatefulController(Controller):
    """A controller with a state, which observes everything there is (some of it is NaN before the first step)."""

    observes = OBSERVATIONS

    def __init__(self):
        self.seen: list[float] = []

    def decide(self, observation):
        self.seen.append(sum(observation[name] for name in sorted(OBSERVATIONS) if math.isfinite(observation[name])))
        return {"*": {"lr": 1.0 + 0.01 * (sum(self.seen) % 7), "weight_decay": 1.0}}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@dataclass(frozen=True)
class RunSpec:
    """A run: `python -m scripts.<module> flags`, or torchrun with so many `ranks`. It has a base directory to itself.

    `limited_disk`: the base directory lies on a small disk, which the soak test fills up.
    """

    module: str
    flags: list[str]
    ranks: int = 1
    limited_disk: bool = False


def run_specs(corpus: Path, policy: Path, schedule: Path) -> dict[str, RunSpec]:
    """The runs by name: base_train with each optimizer and kind of controller, meta_train and a sweep."""
    common = ["--preset", "smoke", "--data", str(corpus)]
    tagged = [*common, "--model-tag", TAG, "--device-type", "cpu"]
    base = [*tagged, *f"--num-iterations {STEPS} --save-every 4 --eval-every 20".split()]
    base += ["--sample-tokens", "0", "--device-batch-size", "1"]
    meta = [*tagged, "--updates", str(UPDATES), "--episodes", "3"]
    uniform = [*base, "--hparams", "uniform", "--base-lr", "0.01"]
    schedule_free = [*base, "--optimizer", "schedule-free"]
    stateful = ["--controller", f"{__name__}:{StatefulController.__name__}"]
    return {
        "hand-tuned": RunSpec("base_train", base),
        "two ranks": RunSpec("base_train", [*base, *stateful], ranks=2),
        "meta": RunSpec("meta_train", meta),
        "jel": RunSpec("base_train", [*uniform, "--controller", "jel", "--policy", str(policy)]),
        "full disk": RunSpec("base_train", base, limited_disk=True),
        "schedule-free": RunSpec("base_train", [*schedule_free, "--sf-lr", "0.1"]),
        "meta, two ranks": RunSpec("meta_train", meta, ranks=2),
        "schedule": RunSpec("base_train", [*uniform, "--controller", "schedule", "--policy", str(schedule)]),
        "schedule-free, controlled": RunSpec("base_train", [*schedule_free, *stateful]),
        "sweep": RunSpec("sweep", [*common, "--what", "schedule-free", "--jobs", "2"]),
    }


# -----------------------------------------------------------------------------
# one process of a run


class RunProcess:
    """One process of a run, from its start to its end. Its output goes to `<base>.txt`, outside the limited disk."""

    def __init__(self, spec: RunSpec, base: Path):
        self.spec, self.base, self.folder = spec, base, base / "runs" / TAG
        self.output_path = base.with_name(base.name + ".txt")
        self.steps_before = self.steps()
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(spec.ranks), "--max-restarts", "3"]
        command = [*([*launcher, "-m"] if spec.ranks > 1 else []), f"scripts.{spec.module}", *spec.flags]
        resume = ["--resume", "auto"] if spec.module != "sweep" else []
        with open(self.output_path, "a") as output:
            self.output_start = output.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, *resume],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        self.begin = time.monotonic()

    def steps(self) -> int:
        """Steps (or updates) in the run's log."""
        return max((r["step"] + 1 for r in read_log(self.folder) if "loss" in r), default=0)

    def is_training(self) -> bool:
        """Whether it has taken a step: from then on it must stop cleanly."""
        return re.search(r"^(step|update) \d", self.output(), re.MULTILINE) is not None

    def output(self) -> str:
        """What this process has printed."""
        with open(self.output_path, "rb") as f:
            f.seek(self.output_start)
            return f.read().decode(errors="replace")

    def ended(self) -> bool:
        """Raises `TimeoutError` for a process that takes longer than TIMEOUT_SECONDS."""
        if time.monotonic() - self.begin > TIMEOUT_SECONDS:
            raise TimeoutError(f"no end after {TIMEOUT_SECONDS:.0f} s")
        return self.process.poll() is not None

    def wait(self) -> int:
        """The exit status, once it has ended."""
        while not self.ended():
            time.sleep(10 * POLL_SECONDS)
        return self.process.returncode

    def pause(self, seconds: float) -> str:
        """Wait so long, or until the process ends."""
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return f"after {seconds:.1f} s"

    def process_tree(self) -> list[int]:
        """The ids of the process and of all its descendants, parents first."""
        parents = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def ranks(self) -> list[int]:
        """The process ids of the ranks that torchrun has started."""
        return [pid for pid in self.process_tree()[1:] if f"scripts.{self.spec.module}" in command_line(pid)]


def command_line(pid: int) -> str:
    """The command of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def send(pids: list[int], number: int) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# -----------------------------------------------------------------------------
# what is compared


def outcome(spec: RunSpec, base: Path) -> dict[str, str | bytes]:
    """All that a finished run leaves, by name, without the times and paths that differ from run to run."""

    def plain(record: dict) -> str:  # repr: as text, NaN equals NaN
        return repr(sorted((k, v) for k, v in record.items() if k not in TIMING and k != "policy"))

    if spec.module == "sweep":
        sweep = json.loads((base / "runs" / "smoke" / "sweep_schedule_free.json").read_text())
        return {f"row {i}": plain(row) for i, row in enumerate(sweep["rows"])} | {"best": repr(sweep["best"])}
    folder = base / "runs" / TAG
    name = "model.safetensors" if spec.module == "base_train" else "policy.safetensors"
    return {
        name: (folder / name).read_bytes(),
        "result": plain(json.loads((folder / "result.json").read_text())),
        "log": "\n".join(map(plain, read_log(folder))),
    }
