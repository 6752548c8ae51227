"""A process of the benchmark, with an allocator, threads and a rank of its own, which runs one case at a time.

`scripts.bench` starts several and times them in turn, so that all see the same machine. Each line a worker reads is a
spec, `{"case": "step", "threads": 2, "turns": 3, ...}`; it builds the case once (`scripts/bench/cases.py`), runs the
turns, and answers with a line `{"seconds": ..., "result": ...}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from nanochat.common import UserError

# -----------------------------------------------------------------------------
# in the parent


class Worker:
    """A worker process; a context manager that ends it.

    `environment` is added to this process's. `keeps_memory` False leaves the C library's allocator at its defaults on a
    CPU (see `nanochat.common.keep_freed_memory`).
    """

    def __init__(self, device: str, keeps_memory: bool = True, **environment: str):
        command = [sys.executable, "-m", "scripts.bench.worker", device, str(int(keeps_memory))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **environment},
        )

    def begin(self, spec: dict) -> None:
        """Send the spec. Raises `UserError` if the process has ended."""
        try:
            self._process.stdin.write(json.dumps(spec) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError("a process of the benchmark has ended; the reason stands above") from None

    def end(self) -> dict:
        """Wait for the answer to the last spec, `{"seconds", "result"}`.

        Raises `UserError` if the case cannot be run here (no room, no such kernel), or if the process fails.
        """
        line = self._process.stdout.readline()
        if not line:
            raise UserError("a process of the benchmark has failed; the reason stands above")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def seconds_of(workers: Worker | Sequence[Worker], spec: dict) -> float:
    """Seconds that the workers, side by side, take for the spec."""
    workers = [workers] if isinstance(workers, Worker) else workers
    for worker in workers:
        worker.begin(spec)
    return max([worker.end()["seconds"] for worker in workers])


def result_of(worker: Worker, spec: dict):
    """The result of the spec's last turn."""
    worker.begin(spec)
    return worker.end()["result"]


def interleaved(
    sides: Mapping[Hashable, Callable[[], float]], seconds: float, min_rounds: int = 3
) -> dict[Hashable, list[float]]:
    """Call the sides in turn, A B A B ..., for so many seconds and at least `min_rounds` rounds.

    Returns the values that each side gave. One more round comes first, which builds and warms up, and is not counted.
    """
    for side in sides.values():
        side()
    values, deadline = {name: [] for name in sides}, time.perf_counter() + seconds
    while min(map(len, values.values())) < min_rounds or time.perf_counter() < deadline:
        for name, side in sides.items():
            values[name].append(side())
    return values


# -----------------------------------------------------------------------------
# in the worker


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints goes to stderr: stdout carries the answers
    import torch

    from nanochat.common import Compute, init_compute
    from scripts.bench.cases import CASES

    device, keeps_memory = sys.argv[1], sys.argv[2] == "1"
    plain = device == "cpu" and not keeps_memory
    compute = Compute(0, 1, torch.device("cpu")) if plain else init_compute(device)
    torch._dynamo.config.recompile_limit = 64  # the cases of one process compile the same functions at many shapes
    built: dict[str, Callable] = {}
    for line in sys.stdin:
        spec = json.loads(line)
        turns = spec.pop("turns", 1)
        torch.set_num_threads(spec.pop("threads", torch.get_num_threads()))
        key = json.dumps(spec, sort_keys=True)
        try:
            if key not in built:
                if compute.is_cuda:
                    built.clear()  # one case in memory at a time: another is compiled again, from the disk
                built[key] = CASES[spec["case"]](spec, compute)
            compute.synchronize()
            start, result = time.perf_counter(), None
            for _ in range(turns):
                result = built[key]()
            compute.synchronize()
            answer = {"seconds": time.perf_counter() - start, "result": result}
        except (UserError, torch.OutOfMemoryError) as e:
            built.pop(key, None)
            answer = {"error": " ".join(str(e).split())}
        if compute.is_cuda:
            torch.cuda.empty_cache()  # other workers share the GPU
        print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    from nanochat.common import run_main

    run_main(main)
