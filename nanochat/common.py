"""What every entry point needs: errors, ranks and device, the base directory, seeds, and the log of a run.

Nothing here runs at import: a script calls `init_compute` once and passes the result on.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# errors


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""


def run_main(main, *also: type[Exception]) -> None:
    """Run an entry point and exit. One line on stderr and status 2: a `UserError`, one of `also`, and what the system
    refuses (no room on the disk, no permission, no memory on the GPU). Ctrl-C: status 130.
    """
    ended = False
    try:
        code, ended = main(), True
    except (UserError, OSError, torch.OutOfMemoryError, *also) as e:
        room = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room, then run the same command again (training: with --resume auto)" if room else ""
        print(f"error: {' '.join(str(e).split())}{advice}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    finally:
        if dist.is_initialized() and (
            ended or dist.get_backend() != "nccl"
        ):  # NCCL would wait for ranks that wait for this one
            dist.destroy_process_group()
    sys.exit(code)


# -----------------------------------------------------------------------------
# ranks and device


@dataclass(frozen=True)
class Compute:
    """Where this process runs: its rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        """bf16 autocast on CUDA, a null context elsewhere (a CPU without native bf16 is several times slower in it)."""
        return torch.autocast("cuda", dtype=torch.bfloat16) if self.is_cuda else contextlib.nullcontext()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the body when all ranks are through it, even if one takes longer than NCCL waits (ten minutes)."""
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1)) if self.world_size > 1 else None
        yield
        if group is not None:
            dist.barrier(group)
            dist.destroy_process_group(group)


def init_compute(device_type: str = "") -> Compute:
    """Choose the device (`""` = cuda if present, else cpu) and join the process group if torchrun started us.

    NCCL on CUDA, gloo on CPU. Raises `UserError` for a device that is not there.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in ("cuda", "cpu"):
        raise UserError(f"--device-type {device_type!r} is not supported; use cuda or cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device-type cuda, but torch sees no CUDA device; use --device-type cpu")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if device_type == "cuda":
        device, gpus = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.cuda.device_count()
        if device.index >= gpus:
            raise UserError(
                f"there are more processes than GPUs on this machine; give torchrun --nproc_per_node {gpus}, or --device-type cpu"
            )
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # one program per matrix shape, and a sweep of models in one process
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts: without a place of its own a job finds the addresses of the dead one
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size
        )
    return Compute(rank, world_size, device)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed instead of giving it back to the kernel. Does nothing where it is not glibc.

    By default every tensor of more than some 100 kB is fresh memory from the kernel, which clears it page by page:
    thousands of page faults a step. From here on memory that was once used is used again, and never given back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (bytes)
        mallopt(parameter, value)


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only, unbuffered."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*args, **{"flush": True, **kwargs})


# -----------------------------------------------------------------------------
# files and seeds


def base_dir() -> Path:
    """`$NANOCHAT_BASE_DIR`, default `~/.cache/nanochat`: everything that is written lies under it."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def derive_seed(seed: int, *names) -> int:
    """A 63-bit seed for the named purpose, so that every random choice descends from one `--seed`.

    >>> derive_seed(1, "init") != derive_seed(1, "probe")
    True
    """
    digest = hashlib.sha256(repr((int(seed), *map(str, names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_json(path: Path, what: str = "file"):
    """Read JSON; raises `UserError` in one line if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} cannot be read as JSON ({e})") from None


# -----------------------------------------------------------------------------
# the log of a run


def environment_record(compute: Compute) -> dict:
    """The command, versions, git commit and device of this process, for `config.json`."""
    try:
        commit = (
            subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=Path(__file__).parent,
                text=True,
                capture_output=True,
                timeout=10,
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        commit = None
    name = torch.cuda.get_device_name(compute.device) if compute.is_cuda else platform.processor() or platform.machine()
    script = getattr(
        sys.modules["__main__"].__spec__, "name", None
    )  # as `python -m` was told; a path would be this machine's
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


class NullLogger:
    """Stands in for a wandb run: the same two methods, doing nothing."""

    def log(self, values: dict) -> None: ...

    def finish(self) -> None: ...


def wandb_logger(name: str, config: dict, project: str = "nanochat"):
    """A wandb run called `name`, or a `NullLogger` for `""` and `"dummy"` (off)."""
    if name in ("", "dummy"):
        return NullLogger()
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"--run {name} needs wandb, which is not installed: pip install wandb, or --run dummy"
        ) from None
    return wandb.init(project=project, name=name, config=config)


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
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, self._path)

    def finish(self, **result) -> None:
        if self.active:
            write_json(self.folder / "result.json", result)
            self._file.close()
            self._wandb.finish()


def read_log(folder: Path) -> list[dict]:
    """The records of `log.jsonl`, up to the first line that is none: a killed run may leave a torn one at the end."""
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
        """Call after each step; returns seconds left, or None while there is nothing to tell."""
        if self.t0 is None:
            if done - self.start >= self.skip:
                self.t0, self.start = time.perf_counter(), done
            return None
        return (time.perf_counter() - self.t0) / (done - self.start) * (self.total - done)


def format_seconds(seconds: float | None) -> str:
    """`75 -> '1m15s'`, None -> '?'."""
    if seconds is None:
        return "?"
    minutes, s = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{s:02d}s" if minutes else f"{s}s"
