"""What fits a device, and what it can do."""

from __future__ import annotations

import os

import pytest
import torch

from nanochat import preemption
from nanochat.common import Compute, grow_segments
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import MEMORY_SHARE, fitting_rows, free_bytes, peak_flops, peak_memory_bytes, step_bytes
from nanochat.run_log import without_compilation
from nanochat.schedule_free import ScheduleFreeMuon
from scripts import base_train
from scripts.presets import parse_with_preset

PAPER = GPTConfig.from_depth(6)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("gigabytes", [1, 24, 80, 141, 10_000])
def test_rows_divide_the_step_and_fit(world_size, gigabytes):
    rows, free = fitting_rows(PAPER, 256, world_size, gigabytes * 10**9, True), gigabytes * 10**9
    share = 256 // world_size
    assert rows >= 1 and share % rows == 0
    assert rows == 1 or step_bytes(PAPER, rows, True) <= MEMORY_SHARE * free
    larger = [n for n in range(rows + 1, share + 1) if share % n == 0]
    assert not larger or step_bytes(PAPER, larger[0], True) > MEMORY_SHARE * free


def test_rows_that_do_not_divide_by_the_ranks_are_none():
    assert fitting_rows(PAPER, 256, 3, 10**11, True) == 0


def test_an_h200_holds_more_than_the_default_and_a_small_card_less():
    rows = {gb: fitting_rows(PAPER, 256, 1, gb * 10**9, True) for gb in (16, 80, 141)}
    assert rows[16] < 32 <= rows[80] <= rows[141]


def test_a_kernel_of_the_loss_holds_fewer_logits():
    """At depth 6 and 32 rows the full logits are 21 GB of 35; a kernel's are 2 GB, and cut-cross-entropy has none."""
    gigabytes = {k: step_bytes(PAPER, 32, True, k) / 1e9 for k in ("plain", "triton", "liger", "cce")}
    assert gigabytes["plain"] - gigabytes["triton"] > 18 and gigabytes["triton"] == gigabytes["liger"]
    assert gigabytes["triton"] - gigabytes["cce"] == pytest.approx(2 * 2**30 / 1e9)
    rows = {k: fitting_rows(PAPER, 256, 1, 80 * 10**9, True, k) for k in gigabytes}
    assert rows["plain"] == 32 and rows["triton"] == 128
    growth = step_bytes(PAPER, 64, True, "triton") - step_bytes(PAPER, 32, True, "triton")
    assert growth < (step_bytes(PAPER, 64, True) - step_bytes(PAPER, 32, True)) / 2
    assert step_bytes(PAPER, 32, False, "chunked") == step_bytes(PAPER, 32, False)


def test_minus_one_asks_for_the_kernel_of_the_loss(monkeypatch):
    """With "auto" the measured one, at the shape that `GPT.prepare` measures too, so that it is measured once."""
    args = parse_with_preset(base_train.flags(), "base_train", ["--preset", "paper", "--device-batch-size", "-1"])
    asked = []
    monkeypatch.setattr(base_train, "loss_kernel_for", lambda *a: asked.append(a) or "triton")
    monkeypatch.setattr(base_train, "free_bytes", lambda device: 80 * 10**9)
    monkeypatch.setattr(base_train, "least_over_ranks", lambda value, compute: value)
    rows = base_train.rows_that_fit(args, PAPER, Compute(0, 1, torch.device("cuda")))
    assert rows == fitting_rows(PAPER, 256, 1, 80 * 10**9, True, "triton")
    assert asked == [("cuda", True, (None, 256 * 2048, 384, 32768, 32768), "auto")]


def test_minus_one_is_taken_by_base_train(monkeypatch, capsys):
    args = parse_with_preset(base_train.flags(), "base_train", ["--preset", "smoke", "--device-batch-size", "-1"])
    base_train.check_flags(args)
    compute = base_train.Compute(0, 1, torch.device("cpu"))
    config = GPTConfig(sequence_len=64, vocab_size=320, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    assert base_train.rows_that_fit(args, config, compute) == 4  # all rows of a step
    assert "4 of 4" in capsys.readouterr().out


def test_peaks_go_by_the_first_name_that_is_known():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("a card of tomorrow") is None
    cpu = torch.device("cpu")
    assert free_bytes(cpu) > 0 and peak_memory_bytes(cpu) > 1e7


def test_what_compiled_is_charged_at_the_mean():
    assert without_compilation([60.0, 2.0, 4.0], True) == 9.0 and without_compilation([60.0, 2.0], False) == 62.0
    assert without_compilation([60.0], True) == 60.0 and without_compilation([], True) == 0.0


def test_validation_is_a_small_part_of_a_run_at_paper_size():
    """Every 141 steps with the tokens as they were; every 50 steps it was 15% and more."""
    args = parse_with_preset(base_train.flags(), "base_train", ["--preset", "paper"])
    assert args.eval_tokens == 20 * 524288
    share = {
        n: (1 + -(-561 // n)) * args.eval_tokens / 3 / (561 * args.total_batch_size) for n in (args.eval_every, 50)
    }
    assert share[args.eval_every] < 0.07 and share[50] > 0.15


@pytest.mark.parametrize("free", [False, True])
def test_embedding_tables_are_fp32_under_bf16_for_every_method(free):
    model = GPT(GPTConfig(sequence_len=8, vocab_size=70, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = model.setup_optimizer()
    if free:
        optimizer = ScheduleFreeMuon(optimizer.param_groups, 1.0, 0.0, 0)
    idx = torch.arange(8)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        looked_up = model.transformer.wte(idx)
        model(idx, idx).backward()
    optimizer.step()
    tables = [model.transformer.wte.weight, *(e.weight for e in model.value_embeds.values())]
    assert looked_up.dtype == torch.bfloat16 and all(t.dtype == t.grad.dtype == torch.float32 for t in tables)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_unless_the_user_has_set_it(monkeypatch, own):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    grow_segments()
    grow_segments()  # twice is once
    found = {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name}
    assert found == ({own: "max_split_size_mb:512"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_gpus_exchange_the_wish_to_stop_seldom(monkeypatch):
    """No exchange, which would wait for the device, but at every tenth step; a rank alone needs none."""
    asked = []
    monkeypatch.setattr(preemption.signal, "signal", lambda *_: None)
    monkeypatch.setattr(preemption.dist, "all_reduce", lambda flag, op: asked.append(flag.item()))
    monkeypatch.setattr(preemption.torch, "tensor", lambda value, device: torch.as_tensor(value))
    stop = preemption.StopRequest(Compute(0, 2, torch.device("cuda")))
    stop.signal_number = 15
    assert [step for step in range(1, 31) if stop.requested(step)] == [10, 20, 30] and asked == [1.0] * 3
    alone = preemption.StopRequest(Compute(0, 1, torch.device("cuda")))
    alone.signal_number = 15
    assert alone.requested(7) and len(asked) == 3
