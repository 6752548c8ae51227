"""What the benchmark times: each case is built from its spec and returns a function that runs one turn of it.

The hook stands in `hook`, episodes in `case_episodes`, text to batches in `case_data`.
R runs, B rows of a batch, T time.
"""

from __future__ import annotations

import os
import sysconfig
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from jel import IDENTITY, Controller, PolicyController, apply_multipliers, as_decision
from jel.learn.workers import ParallelTask
from jel.tasks.pretrain import PretrainTask, group_names, uniform_base
from nanochat.common import Compute, base_dir, need
from nanochat.dataloader import DataLoader
from nanochat.dataset import stdlib_texts, write_shards
from nanochat.divergence_guard import DivergenceGuard
from nanochat.files import locked
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import peak_memory_bytes
from nanochat.lr_schedule import base_hparams
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, tokenizer_folder
from nanochat.train_step import train_step
from scripts.bench.twins import StraightOptimizer, straight_loss

RUN_STEPS, DECISION_INTERVAL = 100, 10  # of the schedule that steps are timed under
SCHEDULE = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}


# -----------------------------------------------------------------------------
# a training step


def build_model(spec: dict, compute: Compute) -> GPT:
    """The spec's model on the device, initialised, built as every script builds it."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**spec["model"]), runs=spec.get("runs"))
    model.to_empty(device=compute.device).init_weights(torch.Generator(compute.device).manual_seed(0))
    return model


def hook(groups: list[dict], step: int, controller: Controller | None, multipliers: dict, guard: DivergenceGuard):
    """The hook of `base_train` at this step: base schedule, controller, param groups. Returns the multipliers."""
    base = base_hparams(groups, step % RUN_STEPS, RUN_STEPS, **SCHEDULE)
    if controller and step % DECISION_INTERVAL == 0:
        multipliers = as_decision(controller.decide({"progress": step % RUN_STEPS / RUN_STEPS})).multipliers
    apply_multipliers(groups, base, guard.limit(multipliers))
    return multipliers


def case_step(spec: dict, compute: Compute) -> Callable[[], None]:
    """An optimizer step of B rows as `base_train` takes it: hook, loss, backward, update.

    `form`: "ours" or "straight" (`scripts/bench/twins.py`). `compiled`: True puts either under torch.compile; without
    it ours is compiled where `base_train` compiles (on CUDA) and the straightforward form is eager. `prepare`: further
    arguments of `GPT.prepare`.
    The shipped policy decides every 10 steps. With `runs`, R models are trained as one program on the same rows, each
    at a learning rate of its own. `bf16`: Muon's products of the straightforward form in bf16 on a CPU too.
    """
    model, R = build_model(spec, compute), spec.get("runs")
    optimizer = model.setup_optimizer(weight_decay=0.1, rank=compute.rank, world_size=compute.world_size)
    groups = optimizer.param_groups
    if spec["form"] == "straight":
        product_dtype = torch.bfloat16 if compute.is_cuda or spec.get("bf16") else None
        optimizer = StraightOptimizer(groups, product_dtype, compiled=spec.get("compiled", False))
        forward = partial(straight_loss, model)
        if spec.get("compiled"):
            forward = torch.compile(forward, dynamic=False)
    else:
        rows = spec["rows"] // compute.world_size
        forward = model.prepare(compiled=spec.get("compiled"), rows=rows, **spec.get("prepare", {}))

    controller, multipliers, guard = PolicyController(), IDENTITY, DivergenceGuard(0)
    if R is not None:
        controller, multipliers = None, {"*": {"lr": torch.linspace(0.5, 2.0, R, device=compute.device)}}
    shape = 4, 2, spec["rows"] // compute.world_size, model.config.sequence_len
    batches = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    batches = batches.to(compute.device)  # (4 batches, inputs and targets, B, T)
    step = 0

    def turn() -> None:
        nonlocal step, multipliers
        multipliers = hook(groups, step, controller, multipliers, guard)
        micro_batches = [batches[(step + i) % 4] for i in range(spec.get("accumulation", 1))]
        train_step(forward, optimizer, micro_batches, compute)
        step += 1

    return turn


def case_controller(spec: dict, compute: Compute) -> Callable[[], dict]:
    """Milliseconds of the hook at a step with a decision, by the shipped policy: `{"ms"}`, the mean of 1000."""
    controller, guard = PolicyController(), DivergenceGuard(0)
    groups = build_model(spec, compute).setup_optimizer().param_groups

    def turn() -> dict:
        start = time.perf_counter()
        for i in range(1000):
            hook(groups, i * DECISION_INTERVAL, controller, IDENTITY, guard)
        return {"ms": time.perf_counter() - start}  # seconds of 1000 = milliseconds of one

    return turn


def case_memory(spec: dict, compute: Compute) -> Callable[[], dict]:
    """The most memory (bytes) that 3 steps of the spec take beyond what the process held before: `{"bytes"}`."""

    def turn() -> dict:
        small = {"runs": 1, "rows": 1, "model": {**spec["model"], "sequence_len": 8, "n_layer": 1}}
        case_step({**spec, **small}, compute)()  # PyTorch loads its libraries on first use: before the measurement
        if compute.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before, step = peak_memory_bytes(compute.device), case_step(spec, compute)
        for _ in range(3):
            step()
        return {"bytes": peak_memory_bytes(compute.device) - before}

    return turn


def case_recompilations(spec: dict, compute: Compute) -> Callable[[], dict]:
    """Programs that are compiled during 120 steps with 12 decisions, after the first two steps: `{"graphs"}`."""
    from torch._dynamo.utils import counters

    step = case_step(spec, compute)

    def turn() -> dict:
        for _ in range(2):
            step()
        before = counters["stats"]["unique_graphs"]
        for _ in range(12 * DECISION_INTERVAL):
            step()
        return {"graphs": counters["stats"]["unique_graphs"] - before}

    return turn


# -----------------------------------------------------------------------------
# episodes


def case_episodes(spec: dict, compute: Compute) -> Callable[[], None]:
    """`steps` steps and one probe batch for each of `episodes` episodes, `together` at a time.

    Episodes that run together share `workers` processes, or are one batched program in this one, on CUDA with
    `cuda_graphs` replayed from a graph.
    """
    together, workers, steps = spec["together"], spec.get("workers", 1), spec["steps"]
    num_steps = 33 * steps
    config = GPTConfig(**spec["model"])
    make = partial(
        PretrainTask,
        config,
        random_cache(config),
        compute,
        num_steps=num_steps,
        batch_size=spec["rows"],
        probe_batches=1,
        make_optimizer=partial(uniform_base, lr=1e-3, weight_decay=1e-2),
        schedule=SCHEDULE,
        seed=0,
        cuda_graphs=spec.get("cuda_graphs", False),
    )
    task = make() if workers == 1 else ParallelTask(make, workers, group_names(config), lambda group: num_steps)
    task.reset(0, range(together))
    multipliers = {"*": {name: torch.ones(together) for name in ("lr", "weight_decay")}}
    step = 0

    def turn() -> None:
        nonlocal step
        for _ in range(0, spec["episodes"], together):
            task.train(step, steps, multipliers)
            task.observe(["probe_loss"])["probe_loss"].cpu()
        step = (step + steps) % num_steps

    return turn


# -----------------------------------------------------------------------------
# text to batches


def case_data(spec: dict, compute: Compute) -> Callable[[], dict]:
    """Make a corpus of `files` files, a tokenizer and its token cache in the base directory, and load batches.

    Returns `{"vocab_size", "cache_mb_per_s", "loader": {T: tokens/s}}`: the tokenizer's vocabulary (the spec's, or the
    largest that the text allows), megabytes of text tokenized per second and core, and the rate of the loader's one
    thread at T tokens a row, each over `seconds`.
    """

    def turn() -> dict:
        library = stdlib_texts(Path(sysconfig.get_path("stdlib")))
        texts = [text for _, text in sorted(library.items())][: spec["files"]]
        documents = ((text, i % 16 == 0) for i, text in enumerate(texts))
        write_shards(base_dir() / "data" / "bench", documents, 2 << 20, source="library")
        tokenizer = largest_tokenizer(texts, spec["vocab_size"])
        tokenizer.save(tokenizer_folder("bench"))
        start = time.perf_counter()
        cache = TokenCache.build(base_dir() / "data" / "bench", tokenizer)
        seconds = time.perf_counter() - start
        return {
            "vocab_size": tokenizer.vocab_size,
            "cache_mb_per_s": sum(len(text.encode()) for text in texts) / 1e6 / seconds / os.cpu_count(),
            "loader": {T: loader_rate(cache, rows, T, spec["seconds"], compute) for T, rows in ((128, 16), (2048, 4))},
        }

    return turn


def loader_rate(cache: TokenCache, rows: int, T: int, seconds: float, compute: Compute) -> float:
    """Tokens/s of a training loader, once its rows are planned."""
    loader = DataLoader(cache, "train", rows, T, compute.device, seed=0)
    for i in range(64):  # these plan the rows
        loader.get(i)
    begin, n = time.perf_counter(), 0
    while (taken := time.perf_counter() - begin) < seconds:
        loader.get(64 + n)
        n += 1
    loader.close()
    return n * rows * T / taken


def largest_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens, or of as many as the text allows, where `Tokenizer.train` would raise."""
    trainer = need("rustbpe", "training a tokenizer").Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return Tokenizer(SPLIT_PATTERN, [bytes(token) for token, _ in ranks])


def random_cache(config: GPTConfig, documents: int = 2048) -> TokenCache:
    """A cache of random tokens of the model's vocabulary, 2 shards: timing needs no text, and no package to read it."""
    folder = base_dir() / "data" / "tokens" / f"random-{config.vocab_size}-{config.sequence_len}"
    cache, length = TokenCache(folder, 2, np.uint16 if config.vocab_size <= 2**16 else np.uint32), config.sequence_len
    with locked(folder):
        for shard in range(2):
            if not (folder / f"shard_{shard:05d}.offsets.npy").exists():
                drawn = np.random.default_rng(shard).integers(0, config.vocab_size, documents * length)
                (folder / f"shard_{shard:05d}.tokens").write_bytes(drawn.astype(cache.dtype).tobytes())
                np.save(folder / f"shard_{shard:05d}.offsets.npy", np.arange(documents + 1, dtype=np.int64) * length)
    return cache


CASES: dict[str, Callable[[dict, Compute], Callable]] = {
    "step": case_step,
    "controller": case_controller,
    "memory": case_memory,
    "recompilations": case_recompilations,
    "episodes": case_episodes,
    "data": case_data,
}
