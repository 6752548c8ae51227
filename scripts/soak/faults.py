"""What the soak test does to a run: the runs it starts, the moments it waits for, and the faults."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jel import OBSERVATIONS, Controller
from nanochat.preemption import REQUEUE_EXIT_CODE
from nanochat.run_log import read_log

PATIENCE = 300.0  # seconds that one process may take before it counts as hanging
POLL = 0.001
STEPS, UPDATES = 60, 8


# -----------------------------------------------------------------------------
# the runs


class Watcher(Controller):
    """A controller with a state, that observes everything there is."""

    observes = OBSERVATIONS

    def __init__(self):
        self.seen: list[float] = []

    def decide(self, observation):
        grad_norm = observation["grad_norm"]
        self.seen.append(observation["probe_loss"] + (grad_norm if math.isfinite(grad_norm) else 0.0))  # NaN at step 0
        return {"*": {"lr": 1.0 + 0.01 * (sum(self.seen) % 7), "weight_decay": 1.0}}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@dataclass(frozen=True)
class Subject:
    """A run to be disturbed: `python -m module flags`, or torchrun with as many `ranks`. It is alone in a base directory."""

    module: str
    flags: list[str]
    ranks: int = 1
    starves: bool = False  # it lies on a disk that fills up


def subjects(corpus: Path, policy: Path, schedule: Path) -> dict[str, Subject]:
    common = ["--preset", "smoke", "--data", str(corpus)]
    base = [
        *common,
        "--model-tag",
        "run",
        "--device-type",
        "cpu",
        "--num-iterations",
        str(STEPS),
        "--save-every",
        "4",
        "--eval-every",
        "20",
        "--sample-tokens",
        "0",
        "--device-batch-size",
        "1",
    ]
    meta = [*common, "--model-tag", "run", "--device-type", "cpu", "--updates", str(UPDATES), "--episodes", "3"]
    uniform = [*base, "--hparams", "uniform", "--base-lr", "0.01"]
    return {
        "hand-tuned": Subject("base_train", base),
        "two ranks": Subject("base_train", [*base, "--controller", "scripts.soak.faults:Watcher"], ranks=2),
        "meta": Subject("meta_train", meta),
        "jel": Subject("base_train", [*uniform, "--controller", "jel", "--policy", str(policy)]),
        "full disk": Subject("base_train", base, starves=True),
        "schedule-free": Subject("base_train", [*base, "--optimizer", "schedule-free", "--sf-lr", "0.1"]),
        "meta, two ranks": Subject("meta_train", meta, ranks=2),
        "schedule": Subject("base_train", [*uniform, "--controller", "schedule", "--policy", str(schedule)]),
        "schedule-free, watched": Subject(
            "base_train", [*base, "--optimizer", "schedule-free", "--controller", "scripts.soak.faults:Watcher"]
        ),
        "sweep": Subject("sweep", [*common, "--what", "schedule-free", "--jobs", "2"]),
    }


class Life:
    """One process of a run, from its start to its end; what it prints goes to `<base>.txt`, on a disk that never fills."""

    def __init__(self, subject: Subject, base: Path):
        self.subject, self.base, self.folder, self.output = (
            subject,
            base,
            base / "runs" / "run",
            base.with_name(base.name + ".txt"),
        )
        self.logged_before = self.steps()
        launcher = [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(subject.ranks),
            "--max-restarts",
            "3",
            "-m",
        ]
        resume = ["--resume", "auto"] if subject.module != "sweep" else []
        with open(self.output, "a") as output:
            self.said_before = output.tell()
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    *(launcher if subject.ranks > 1 else []),
                    f"scripts.{subject.module}",
                    *subject.flags,
                    *resume,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        self.begin = time.monotonic()

    def steps(self) -> int:
        """Steps (or updates) in the log."""
        return max((r["step"] + 1 for r in read_log(self.folder) if "loss" in r), default=0)

    def under_way(self) -> bool:
        """Whether it has got as far as taking steps, and so promises to stop in order."""
        return re.search(r"^(step|update) \d", self.said(), re.MULTILINE) is not None

    def said(self) -> str:
        with open(self.output, "rb") as f:
            f.seek(self.said_before)
            return f.read().decode(errors="replace")

    def ended(self) -> bool:
        if time.monotonic() - self.begin > PATIENCE:
            raise TimeoutError(f"no end after {PATIENCE:.0f} s")
        return self.process.poll() is not None

    def wait(self) -> int:
        while not self.ended():
            time.sleep(10 * POLL)
        return self.process.returncode

    def family(self) -> list[int]:
        """The process and all that descend from it: parents first."""
        parents = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def workers(self) -> list[int]:
        """The ranks that torchrun has started."""
        return [pid for pid in self.family()[1:] if f"scripts.{self.subject.module}" in command(pid)]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# -----------------------------------------------------------------------------
# moments


def await_moment(life: Life, rng: random.Random) -> str:
    """Wait for a random moment of the run's life: in its start, after some step, or in the middle of a save."""
    if life.subject.module == "sweep":
        return pause(life, rng.uniform(1, 25))
    kind = rng.choice(["start", "step", "step", "step", "save", "save"])
    if kind == "start":
        return pause(life, rng.uniform(0, 5))
    total, first = STEPS if life.subject.module == "base_train" else UPDATES, life.logged_before
    target = rng.randint(min(first, total - 1), total - 1)
    while not life.ended() and life.steps() <= target:
        time.sleep(POLL)
    if kind == "save":
        while not life.ended() and not saving(life.folder):
            time.sleep(POLL / 10)
        return "in a save"
    pause(life, rng.uniform(0, 0.03))
    return f"at step {life.steps()}"


def pause(life: Life, seconds: float) -> str:
    end = time.monotonic() + seconds
    while not life.ended() and time.monotonic() < end:
        time.sleep(POLL)
    return f"after {seconds:.1f} s"


def saving(folder: Path) -> bool:
    return any(
        name.startswith(".step_")
        for name in (os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else ())
    )


# -----------------------------------------------------------------------------
# faults: each acts on a life that is not over

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Fault(NamedTuple):
    """What was done, and the exit codes that are in order: of a run that takes steps, and of one that does not yet."""

    what: str
    codes: set[int]
    early_codes: set[int]


def kill(life: Life, rng: random.Random) -> Fault:
    """Everything at once, as when the power fails."""
    send(life.family(), signal.SIGKILL)
    return Fault("SIGKILL", {-9}, {-9})


def stop(life: Life, rng: random.Random) -> Fault:
    number = rng.choice(STOPS[:2] if life.subject.ranks > 1 else STOPS)  # SIGUSR1 ends torchrun alone
    send([life.process.pid], number)
    return Fault(number.name, *stopped(life, number))


def signal_all(life: Life, rng: random.Random) -> Fault:
    """As a scheduler or a terminal does it: the parent passes on what its children have got already."""
    number = rng.choice(STOPS[:2])
    send(life.family(), number)
    return Fault(f"{number.name} to all", *stopped(life, number))


def stopped(life: Life, number: int) -> tuple[set[int], set[int]]:
    code = REQUEUE_EXIT_CODE if life.subject.ranks == 1 else 1  # torchrun has exit codes of its own
    return {code}, {code, -number, 130, 1}  # before the handlers are there, or as Python's KeyboardInterrupt


def insist(life: Life, rng: random.Random) -> Fault:
    """Two signals one after the other: the second one ends it at once, unless it comes too late."""
    first, second = rng.choice(STOPS), rng.choice(STOPS)
    send([life.process.pid], first)
    pause(life, rng.uniform(0, 0.02))
    send([life.process.pid], second)
    codes = {REQUEUE_EXIT_CODE, 128 + second, -second}
    return Fault("two signals", codes, {*codes, -first, 130, 1})


def kill_a_rank(life: Life, rng: random.Random) -> Fault:
    """torchrun is to bring the job back by itself."""
    while not life.ended() and len(life.workers()) < life.subject.ranks:
        time.sleep(POLL)
    if workers := life.workers():
        send([rng.choice(workers)], signal.SIGKILL)
    return Fault("SIGKILL of one rank", {0}, {0})


def kill_the_parent(life: Life, rng: random.Random) -> Fault:
    """torchrun, or the sweep, dies alone: what it started goes on, and whoever resumes has to wait for that."""
    number = rng.choice([signal.SIGKILL, *[signal.SIGUSR1] * (life.subject.ranks > 1)])
    send([life.process.pid], number)
    return Fault(f"{number.name} of the parent alone", {-number}, {-number})


def faults(subject: Subject) -> list:
    if subject.module == "sweep":
        return [kill, stop, signal_all, kill_the_parent]
    return (
        [kill, kill_a_rank, kill_a_rank, stop, signal_all, kill_the_parent]
        if subject.ranks > 1
        else [kill, kill, stop, stop, insist]
    )


# -----------------------------------------------------------------------------
# damage and want of room


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Truncate a file of the checkpoint, flip a bit of it, or remove it."""
    path = rng.choice(sorted(checkpoint.iterdir()))
    data, how = bytearray(path.read_bytes()), rng.choice(["truncated", "flipped", "removed"])
    if how == "removed":
        path.unlink()
        return f"removed: {path.name}"
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data[:at] if how == "truncated" else data)
    return f"{how}: {path.name} at byte {at}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 16 MB at `folder`, if it may be mounted; yields whether it was."""
    folder.mkdir(parents=True)
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True).returncode
        == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def no_room(life: Life, mounted: bool) -> Iterator[str]:
    """Fill the disk, or else forbid the process files of the size of a checkpoint; yields which."""
    if not mounted:
        resource.prlimit(life.process.pid, resource.RLIMIT_FSIZE, (2**17, 2**17))
        yield "file size limit"
        return
    filler = life.base / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while f.write(bytes(2**16)) == 2**16:
            pass
    try:
        yield "full tmpfs"
    finally:
        filler.unlink()


# -----------------------------------------------------------------------------
# what is compared


def remains(subject: Subject, base: Path) -> dict[str, str | bytes]:
    """All that a finished run leaves and that its length in seconds does not change, by name."""
    timing = ("dt", "tokens_per_second", "seconds", "controller_seconds", "policy")
    plain = lambda record: repr(sorted((k, v) for k, v in record.items() if k not in timing))  # repr: NaN is NaN
    if subject.module == "sweep":
        sweep = json.loads((base / "runs" / "smoke" / "sweep_schedule_free.json").read_text())
        return {f"row {i}": plain(row) for i, row in enumerate(sweep["rows"])} | {"best": repr(sweep["best"])}
    folder = base / "runs" / "run"
    name = "model.safetensors" if subject.module == "base_train" else "policy.safetensors"
    return {
        name: (folder / name).read_bytes(),
        "result": plain(json.loads((folder / "result.json").read_text())),
        "log": "\n".join(map(plain, read_log(folder))),
    }
