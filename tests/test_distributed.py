"""Two ranks = one rank: training, state dicts across world sizes, evaluation, stopping. Two gloo processes, float64.

Both ranks compute the one-rank reference beside their own part and compare, so nothing need travel back.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat.common import Compute
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import bits_per_byte
from nanochat.optim_state import state_to_write
from nanochat.preemption import StopRequest
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.train_step import train_step
from scripts.run_state import Progress
from scripts.update_judge import UpdateJudge
from tests.conftest import ROOT

T, V, CPU = 8, 70, torch.device("cpu")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def make_model(n_layer: int = 3, runs: int | None = None) -> GPT:
    """No weight is zero, and 128 padded rows: large enough that AdamW's tables are split over the ranks."""
    g = torch.Generator().manual_seed(0)
    config = GPTConfig(sequence_len=T, vocab_size=V, n_layer=n_layer, n_head=4, n_kv_head=2, n_embd=64)
    model = GPT(config, runs).double()
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.1)
    return model


def make(kind: str, n_layer: int, rank: int, world_size: int):
    model = make_model(n_layer)
    optimizer = model.setup_optimizer(weight_decay=0.2, rank=rank, world_size=world_size)
    if kind == "schedule-free":
        optimizer = ScheduleFreeMuon(optimizer.param_groups, 0.05, 0.01, 2, rank=rank, world_size=world_size)
    return model, optimizer


def batch(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, shape, generator=g), torch.randint(V, shape, generator=g)


def train(model, optimizer, steps, rows=slice(None)):
    """Every other step sends gradients during the backward pass, and every third sends some that are not used."""
    for step in steps:
        if step % 3 == 1:
            with optimizer.reducing():
                model(*(t[rows] for t in batch(4, T, seed=100 + step))).backward()
            optimizer.zero_grad()
        idx, targets = batch(4, T, seed=step)
        with optimizer.reducing() if step % 2 else contextlib.nullcontext():
            model(idx[rows], targets[rows]).backward()
        optimizer.step()
        model.zero_grad()


def assert_equal(found, wanted):
    """Nested dicts of tensors and numbers, to 1e-10."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


# -----------------------------------------------------------------------------
# what both ranks check


def check_training(rank: int, kind: str, n_layer: int) -> None:
    """Half the batch on each rank is the whole batch on one; either state continues at either world size."""
    whole, half = slice(None), slice(2 * rank, 2 * rank + 2)
    alone, paired = make(kind, n_layer, 0, 1), make(kind, n_layer, rank, 2)
    train(*alone, range(3), whole)
    train(*paired, range(3), half)
    assert_equal(paired[0].state_dict(), alone[0].state_dict())
    states = [
        {"model": {k: t.clone() for k, t in m.state_dict().items()}, "optimizer": o.state_dict()}
        for m, o in (alone, paired)
    ]
    assert_equal(*states)
    written = state_to_write(paired[1], keep=rank == 0)  # rank 1 keeps nothing of what it helps to gather
    assert_equal(written, states[1]["optimizer"] if rank == 0 else {})

    from_pair, from_alone = make(kind, n_layer, 0, 1), make(kind, n_layer, rank, 2)
    for (model, optimizer), state in zip((from_alone, from_pair), states):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for run, rows in ((alone, whole), (paired, half), (from_pair, whole), (from_alone, half)):
        train(*run, range(3, 5), rows)
        assert_equal(run[0].state_dict(), alone[0].state_dict())


def check_overlap(rank: int) -> None:
    """Before backward is over, the head's gradient is on its way; what was sent is not sent again."""
    model, optimizer = make("muon-adamw", 3, rank, 2)
    shards, sent = {shard.group["name"]: shard for shard in optimizer._shards}, []
    seen = model.transformer.wte.weight.register_post_accumulate_grad_hook(
        lambda _: sent.extend(name for name, shard in shards.items() if shard.reduced)
    )
    with optimizer.reducing():
        model(*batch(4, T, seed=0)).backward()
    seen.remove()
    assert "lm_head" in sent
    assert {name for name, shard in shards.items() if not shard.reduced} == {"resid_lambdas", "x0_lambdas"}
    before = shards["lm_head"]._grads[0]
    shards["lm_head"].reduce_once()
    assert shards["lm_head"]._grads[0] is before
    optimizer.zero_grad()
    assert not any(shard.reduced for shard in shards.values())


def check_late_judge(rank: int, kind: str) -> None:
    """A loss that is not finite on one rank, looked at late, leaves the weights of both finite, and alike."""
    model, optimizer = make(kind, 3, rank, 2)
    compute = Compute(rank, 2, CPU)
    evaluator = SimpleNamespace(compute=compute, optimizer=optimizer, training_loss=lambda batches: 1.0)
    loader = SimpleNamespace(micro_steps=1, get=lambda step, micro_step: None)
    judge = UpdateJudge(DivergenceGuard(8), model, evaluator, loader, Progress(), False, late=True)
    verdicts = []
    for step, factor in enumerate((1.0, math.nan if rank == 1 else 1.0, 1.0)):
        judge.expect(step, {}, {})
        rows = [t[2 * rank : 2 * rank + 2] for t in batch(4, T, seed=step)]
        train_step(lambda x, y, factor=factor: factor * model(x, y), optimizer, [rows], compute, accept=judge)
        verdicts += [made.verdict for made in judge.look(everything=step == 2)]
    assert verdicts == [Verdict.TAKE, Verdict.SKIP_SPIKE, Verdict.TAKE]
    for p in model.parameters():
        other = p.detach().clone()
        dist.broadcast(other, 0)
        assert p.isfinite().all() and torch.equal(p, other)


def check_evaluation(rank: int) -> None:
    """The ranks share the batches unevenly: 2 and 1."""
    model, bytes_of, batches = make_model(), (torch.arange(V) + 1) % 5, [batch(4, T, seed=i) for i in range(3)]
    paired = bits_per_byte(model, batches[rank::2], bytes_of, world_size=2)
    alone = bits_per_byte(model, batches, bytes_of)
    assert_equal(paired, alone)


def check_stop(rank: int) -> None:
    """A signal that only one rank sees stops both after the same step."""
    stop = StopRequest(Compute(rank, 2, CPU))
    assert not stop.requested()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested()


def two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    check_training(rank, "muon-adamw", n_layer=3)  # stacks of 2, 3 and 6
    check_training(rank, "muon-adamw", n_layer=2)  # one gate only: the second rank owns nothing but padding
    check_training(rank, "schedule-free", n_layer=3)
    check_overlap(rank)
    check_late_judge(rank, "muon-adamw")
    check_late_judge(rank, "schedule-free")
    check_evaluation(rank)
    check_stop(rank)
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(two_ranks, args=(str(tmp_path / "store"),), nprocs=2)


# -----------------------------------------------------------------------------
# the end of a process

ENDING = """
import glob, sys, torch
from nanochat.common import UserError, init_compute, run_main

def main():
    compute = init_compute("cpu")
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # the first optimizer imports torch._dynamo
    compute.barrier()
    if "fail" in sys.argv:
        raise UserError("it failed")
    return 0

try:
    run_main(main)
finally:
    print(sorted(open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the threads of a process are listed on Linux only")
@pytest.mark.parametrize("how, status", [("well", 0), ("fail", 2)])
def test_no_thread_of_gloo_outlives_the_process_group(how, status):
    """One that runs while the interpreter shuts down ends the process, now and then, with SIGABRT."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    command, pipe = [sys.executable, "-c", ENDING, how], {"text": True, "stdout": subprocess.PIPE}
    ranks = [subprocess.Popen(command, cwd=ROOT, env={**env, "RANK": str(rank)}, **pipe) for rank in range(2)]
    for rank in ranks:
        threads = rank.communicate(timeout=120)[0]
        assert rank.returncode == status and "python" in threads and "gloo" not in threads, threads


# -----------------------------------------------------------------------------
# their one-rank meaning


def slow_bits_per_byte(model, batches, token_bytes):
    """Token by token: nats of every target that has bytes, over ln 2 times those bytes."""
    nats = total = 0.0
    for idx, targets in batches:
        log_p = model(idx).log_softmax(-1)
        for b in range(idx.size(0)):
            for t in range(idx.size(1)):
                target = int(targets[b, t])
                if target >= 0 and token_bytes[target] > 0:
                    nats -= log_p[b, t, target].item()
                    total += int(token_bytes[target])
    return nats / (math.log(2) * total)


def test_bits_per_byte_equals_its_slow_twin():
    model, token_bytes, batches = make_model(), (torch.arange(V) + 1) % 5, [batch(3, T, seed=i) for i in range(2)]
    batches[0][1][0, :3] = -1
    found = bits_per_byte(model, batches, token_bytes)
    assert found == pytest.approx(slow_bits_per_byte(model, batches, token_bytes), rel=1e-10)


def test_bits_per_byte_of_runs_is_one_value_a_run():
    together, alone, token_bytes = make_model(runs=2), make_model(), (torch.arange(V) + 1) % 5
    batches = [batch(3, T, seed=0)]
    with torch.no_grad():
        for name, p in together.named_parameters():
            p[1] = alone.get_parameter(name)
    found = bits_per_byte(together, batches, token_bytes)
    assert len(found) == 2 and found[0] != found[1]
    assert found[1] == pytest.approx(bits_per_byte(alone, batches, token_bytes), rel=1e-10)


def test_bits_per_byte_without_bytes():
    with pytest.raises(ValueError, match="special tokens only"):
        bits_per_byte(make_model(), [batch(1, T, seed=0)], torch.zeros(V, dtype=torch.long))


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_asks_and_a_second_one_insists(number, monkeypatch):
    exits, before = [], [signal.getsignal(s) for s in SIGNALS]
    monkeypatch.setattr(os, "_exit", exits.append)
    try:
        stop = StopRequest(Compute(0, 1, CPU))
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and not exits
        os.kill(os.getpid(), number)
        assert exits == [128 + number]
    finally:
        for s, handler in zip(SIGNALS, before):
            signal.signal(s, handler)
