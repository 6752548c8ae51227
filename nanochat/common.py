"""What every entry point needs: errors, ranks and device, the base directory and seeds.

Nothing here runs at import: a script calls `init_compute` once and passes the result on.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import hashlib
import importlib
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# errors


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, and what to do."""


def run_main(main, *also: type[Exception]) -> None:
    """Run an entry point, close the process group, and exit with what `main` returns.

    A `UserError`, one of `also`, and what the system refuses (no room on the disk, no permission, no memory on the GPU)
    end in one line on stderr and status 2; Ctrl-C in status 130.
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
        # after a failure NCCL would wait for ranks that wait for this one
        if dist.is_initialized() and (ended or dist.get_backend() != "nccl"):
            dist.destroy_process_group()
    sys.exit(code)


def need(module: str, what_for: str):
    """Import a package that only some work needs, at the moment of that work. Raises `UserError` if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{what_for} needs the package {package}, which is not installed: pip install {package}"
        ) from None


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
        """bf16 autocast on CUDA, nothing elsewhere: a CPU without native bf16 is several times slower in it."""
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
                f"there are more processes than GPUs on this machine; give torchrun --nproc_per_node {gpus}, "
                "or --device-type cpu"
            )
        grow_segments()
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        # one program a matrix shape, and sweeps train models of several shapes in one process
        torch._dynamo.config.recompile_limit = 64
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        # Its functions have the default process group as a default argument. Imported after the group is there (the
        # first optimizer does it, by way of torch._dynamo), they would keep it alive after `destroy_process_group`,
        # and gloo's threads with it: a process that ends while they run may die of SIGABRT.
        from torch.distributed.nn import functional  # noqa: F401

        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts: without a prefix a job would find the addresses of the dead one
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        where = {"backend": "nccl", "device_id": device} if device_type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**where, store=store, rank=rank, world_size=world_size)
    return Compute(rank, world_size, device)


def least_over_ranks(value: int, compute: Compute) -> int:
    """The least of the ranks' values; collective."""
    least = torch.tensor(value, device=compute.device)
    if compute.world_size > 1:
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory instead of giving it back to the kernel. Does nothing without glibc.

    By default every tensor above about 100 kB is fresh memory from the kernel, which clears it page by page: thousands
    of page faults a step. After this call memory is used again, and not given back before the process ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD (bytes)
        mallopt(parameter, value)


def grow_segments() -> None:
    """Have CUDA's allocator grow its blocks in place, so that tensors of changing sizes leave fewer gaps.

    Settings of the user's own (PYTORCH_ALLOC_CONF, or its older name) stay as they are; child processes inherit it.
    """
    if {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}.isdisjoint(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = settings = "expandable_segments:True"
        # this process may have read the environment already; a torch without the function serves the children alone
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._accelerator_setAllocatorSettings(settings)


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only, unbuffered."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*args, **{"flush": True, **kwargs})


# -----------------------------------------------------------------------------
# base directory and seeds


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
