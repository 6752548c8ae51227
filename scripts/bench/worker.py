"""One side of a comparison: a process of its own (its allocator, its threads, its ranks) that runs when it is told to.

`scripts.bench` starts several and times them in turn, so that all see the same machine. Each line a worker reads is a
spec, `{"case": "step", "threads": 2, "turns": 3, ...}`; it builds the case once, runs the turns, and answers with a line
`{"seconds": ..., "result": ...}`. The cases are the functions named `case_*`: spec -> what a turn calls.

R runs, B batch, T time.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path

from nanochat.common import UserError

STEPS = 3  # of each episode in a turn of `case_episodes`
SCHEDULE = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}


# -----------------------------------------------------------------------------
# what the parent holds


class Worker:
    """A worker process. `environment` is added to ours; `keeps_memory` False leaves the C library's allocator as it is."""

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
        try:
            self._process.stdin.write(json.dumps(spec) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError("a process of the benchmark has ended; the reason stands above") from None

    def end(self) -> dict:
        """The answer to the last spec: `{"seconds", "result"}`."""
        line = self._process.stdout.readline()
        if not line:
            raise UserError("a process of the benchmark has failed; the reason stands above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def run(workers: Worker | Sequence[Worker], spec: dict) -> float:
    """Seconds that the workers, side by side, take for the spec."""
    workers = [workers] if isinstance(workers, Worker) else workers
    for worker in workers:
        worker.begin(spec)
    return max(worker.end()["seconds"] for worker in workers)


def in_turn(
    sides: Mapping[Hashable, Callable[[], float]], seconds: float, least: int = 3
) -> dict[Hashable, list[float]]:
    """Call the sides in turn, A B A B ..., for so many seconds and at least `least` rounds -> what each call returned.

    The round before, which builds and warms up, does not count.
    """
    for side in sides.values():
        side()
    values, deadline = {name: [] for name in sides}, time.perf_counter() + seconds
    while min(map(len, values.values())) < least or time.perf_counter() < deadline:
        for name, side in sides.items():
            values[name].append(side())
    return values


def ask(worker: Worker, spec: dict):
    """The result of the spec's last turn."""
    worker.begin(spec)
    return worker.end()["result"]


# -----------------------------------------------------------------------------
# cases


def build_model(spec: dict, compute):
    """The spec's model on the device, its weights set, as every script builds it."""
    import torch

    from nanochat.gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(**spec["model"]), runs=spec.get("runs"))
    model.to_empty(device=compute.device).init_weights(torch.Generator(compute.device).manual_seed(0))
    return model


def case_step(spec: dict, compute) -> Callable[[], None]:
    """An optimizer step of B rows as `base_train` takes it: loss, backward, hook, update.

    `form` is "ours", "straight", or "compiled": ours, and compiled on a CPU too.

    The shipped policy decides every 10 steps. With `runs` R models are trained as one program, on the same rows, each
    with learning rates of its own.
    """
    import torch

    from jel.actions import apply_multipliers
    from jel.controller import PolicyController
    from nanochat.lr_schedule import base_hparams, set_momentum
    from scripts.bench.twins import StraightOptimizer, straight_loss

    model = build_model(spec, compute)
    optimizer = model.setup_optimizer(weight_decay=0.1, rank=compute.rank, world_size=compute.world_size)
    groups, R = optimizer.param_groups, spec.get("runs")
    forward = model.prepare(compiled=True if spec["form"] == "compiled" else None)
    if spec["form"] == "straight":
        products = torch.bfloat16 if compute.is_cuda or spec.get("bf16") else None
        optimizer = StraightOptimizer(groups, products)

        def forward(*batch):
            return straight_loss(model, *batch)

    controller, factors = (
        PolicyController(),
        None if R is None else {"*": {"lr": torch.linspace(0.5, 2.0, R, device=compute.device)}},
    )
    shape = 4, 2, spec["rows"] // compute.world_size, model.config.sequence_len
    batches = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).to(
        compute.device
    )
    accumulation, step = spec.get("accumulation", 1), 0

    def turn() -> None:
        nonlocal step, factors
        for micro_step in range(accumulation):
            with compute.autocast():
                loss = forward(*batches[(step + micro_step) % 4])
            (loss.sum() / accumulation).backward()
        if R is None and step % 10 == 0:
            factors = controller.decide({"progress": step % 100 / 100})
        apply_multipliers(groups, base_hparams(groups, step % 100, 100, **SCHEDULE), factors)
        set_momentum(groups, step)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1

    return turn


def case_episodes(spec: dict, compute) -> Callable[[], None]:
    """STEPS steps of each of `episodes` episodes, `together` at a time, and a probe batch (tiny: 4 every 15 steps).

    Those that are together share `workers` processes, or are one program in this one.
    """
    import torch

    from jel.learn.workers import ParallelTask
    from jel.tasks.pretrain import PretrainTask
    from nanochat.gpt import GPTConfig

    together, workers = spec["together"], spec.get("workers", 1)
    make = partial(
        PretrainTask,
        GPTConfig(**spec["model"]),
        open_cache(),
        compute,
        num_steps=99,
        batch_size=spec["rows"],
        probe_batches=1,
        base_lr=1e-3,
        base_wd=1e-2,
        schedule=SCHEDULE,
        seed=0,
    )
    task = make() if workers == 1 else ParallelTask(make, workers, 99)
    task.reset(0, range(together))
    factors = {name: torch.ones(together) for name in ("lr", "weight_decay")}
    step = 0

    def turn() -> None:
        nonlocal step
        for _ in range(0, spec["episodes"], together):
            task.train(step, STEPS, factors)
            task.probe_loss().cpu()
        step = (step + STEPS) % 99

    return turn


def case_controller(spec: dict, compute) -> Callable[[], dict]:
    """1000 decisions of the shipped policy and the writing of the param groups: `{"ms"}`, each."""
    from jel.actions import apply_multipliers
    from jel.controller import PolicyController
    from nanochat.lr_schedule import base_hparams

    controller, groups = PolicyController(), build_model(spec, compute).setup_optimizer().param_groups
    base = base_hparams(groups, 0, 100, **SCHEDULE)

    def turn() -> dict:
        start = time.perf_counter()
        for i in range(1000):
            apply_multipliers(groups, base, controller.decide({"progress": i / 1000}))
        return {"ms": time.perf_counter() - start}

    return turn


def case_memory(spec: dict, compute) -> Callable[[], dict]:
    """The most memory (bytes) that 3 steps of the spec's case take beyond what the process held before: `{"bytes"}`."""
    import torch

    def peak() -> int:
        return (
            torch.cuda.max_memory_allocated()
            if compute.is_cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )

    def turn() -> dict:
        small = {"runs": 1, "rows": 1, "model": {**spec["model"], "sequence_len": 8, "n_layer": 1}}
        case_step({**spec, **small}, compute)()  # what PyTorch loads on first use is not the case's
        if compute.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before, step = peak(), case_step(spec, compute)
        for _ in range(3):
            step()
        return {"bytes": peak() - before}

    return turn


def case_recompilations(spec: dict, compute) -> Callable[[], dict]:
    """Programs that are compiled during 120 steps with 12 decisions, after the first two steps: `{"graphs"}`."""
    from torch._dynamo.utils import counters

    step = case_step(spec, compute)

    def turn() -> dict:
        for _ in range(2):
            step()
        before = counters["stats"]["unique_graphs"]
        for _ in range(120):
            step()
        return {"graphs": counters["stats"]["unique_graphs"] - before}

    return turn


# -----------------------------------------------------------------------------
# data


def case_data(spec: dict, compute) -> Callable[[], dict]:
    """Make a corpus, a tokenizer and its cache in the base directory.

    Returns `{"vocab_size", "cache_mb_per_s", "loader": {T: tokens/s}}`: the tokenizer's vocabulary, megabytes of text
    tokenized per second and core, and the rate of the loader's one thread at T tokens a row. The vocabulary is the
    spec's, or the largest that the text allows.
    """
    import sysconfig

    from nanochat.common import base_dir
    from nanochat.dataloader import DataLoader
    from nanochat.dataset import library_texts, write_shards
    from nanochat.token_cache import TokenCache
    from nanochat.tokenizer import Tokenizer, tokenizer_folder

    def turn() -> dict:
        texts = [text for _, text in sorted(library_texts(Path(sysconfig.get_path("stdlib"))).items())][: spec["files"]]
        write_shards(
            base_dir() / "data" / "bench",
            ((text, i % 16 == 0) for i, text in enumerate(texts)),
            2 << 20,
            source="library",
        )
        tokenizer = largest_tokenizer(texts, spec["vocab_size"])
        tokenizer.save(tokenizer_folder("bench"))
        start = time.perf_counter()
        cache = TokenCache.build(base_dir() / "data" / "bench", tokenizer)
        seconds, loader = time.perf_counter() - start, {}
        for T, rows in ((128, 16), (2048, 4)):
            source = DataLoader(cache, "train", rows, T, compute.device)
            for i in range(64):  # the first ones plan the rows, which is done once
                source.get(i)
            begin, n = time.perf_counter(), 0
            while (taken := time.perf_counter() - begin) < spec["seconds"]:
                source.get(64 + n)
                n += 1
            source.close()
            loader[T] = n * rows * T / taken
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        return {
            "vocab_size": tokenizer.vocab_size,
            "cache_mb_per_s": megabytes / seconds / os.cpu_count(),
            "loader": loader,
        }

    return turn


def largest_tokenizer(texts: Sequence[str], vocab_size: int):
    """A tokenizer of `vocab_size` tokens, or of as many as the merges in `texts` give (`Tokenizer.train` raises there)."""
    import rustbpe

    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Tokenizer(SPLIT_PATTERN, [bytes(token) for token, _ in ranks])


def open_cache():
    """The cache that `case_data` has made."""
    from nanochat.common import base_dir
    from nanochat.token_cache import TokenCache
    from nanochat.tokenizer import Tokenizer, tokenizer_folder

    return TokenCache.build(base_dir() / "data" / "bench", Tokenizer.load(tokenizer_folder("bench")))


# -----------------------------------------------------------------------------
# the worker


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints is not an answer
    import torch

    from nanochat.common import Compute, init_compute

    compute = init_compute(sys.argv[1]) if sys.argv[2] == "1" else Compute(0, 1, torch.device(sys.argv[1]))
    cases: dict[str, Callable] = {}
    for line in sys.stdin:
        spec = json.loads(line)
        turns = spec.pop("turns", 1)
        torch.set_num_threads(spec.pop("threads", torch.get_num_threads()))
        key = json.dumps(spec, sort_keys=True)
        if key not in cases:
            cases[key] = globals()[f"case_{spec['case']}"](spec, compute)
        compute.synchronize()
        start, result = time.perf_counter(), None
        for _ in range(turns):
            result = cases[key]()
        compute.synchronize()
        seconds = time.perf_counter() - start
        if compute.is_cuda:
            torch.cuda.empty_cache()  # other workers share the GPU
        print(json.dumps({"seconds": seconds, "result": result}), file=answers)
    return 0


if __name__ == "__main__":
    from nanochat.common import run_main

    run_main(main)
