"""What only a GPU can tell; skipped without one. `pytest -m cuda tests` is a step of scripts/first_gpu_hour.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from jel.tasks.pretrain import PretrainTask, uniform_base
from nanochat.common import Compute, init_compute
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.gpt import GPT, GPTConfig
from nanochat.train_step import train_step
from scripts.bench.cases import random_cache
from scripts.run_state import Progress
from scripts.update_judge import UpdateJudge
from tests.conftest import ROOT, run_script

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

CONFIG = GPTConfig(sequence_len=512, vocab_size=4096, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)


@pytest.fixture
def gpu() -> Compute:
    return init_compute("cuda")


def model_on(device: str, runs: int | None = None) -> GPT:
    """The same weights on every device, none of them 0."""
    model, g = GPT(CONFIG, runs), torch.Generator().manual_seed(0)
    model.init_weights(g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))
    return model.to(device)


def batch(rows: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randint(CONFIG.vocab_size, (2, rows, 512), generator=torch.Generator().manual_seed(seed))
    return both[0], both[1]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def test_bf16_on_the_gpu_is_fp32_on_the_cpu(gpu):
    """Loss within 0.5%, and every gradient points the same way."""
    plain, fast = model_on("cpu"), model_on("cuda")
    idx, targets = batch()
    plain.prepare()
    expected = plain(idx, targets)
    expected.backward()
    forward = fast.prepare()
    with gpu.autocast():
        loss = forward(idx.cuda(), targets.cuda())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for (name, a), b in zip(plain.named_parameters(), fast.parameters()):
        assert b.dtype == b.grad.dtype == torch.float32, name
        assert cosine(a.grad, b.grad.cpu()) > 0.98, name


def test_three_steps_on_the_gpu_are_those_of_the_cpu(gpu):
    """Muon's bf16 iteration and rounding move single weights, not the direction of what was learnt."""
    moved = {}
    for device, compute in (("cpu", Compute(0, 1, torch.device("cpu"))), ("cuda", gpu)):
        model = model_on(device)
        start = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        forward, optimizer = model.prepare(), model.setup_optimizer(weight_decay=0.1)
        losses = [
            train_step(forward, optimizer, [tuple(t.to(device) for t in batch(seed=s))], compute).item()
            for s in range(3)
        ]
        moved[device] = losses, {name: p.detach().cpu() - start[name] for name, p in model.named_parameters()}
    assert moved["cuda"][0] == pytest.approx(moved["cpu"][0], rel=1e-2)
    for name, change in moved["cpu"][1].items():
        if change.numel() > 64:  # a few scalars under AdamW follow the sign of tiny gradients
            assert cosine(change, moved["cuda"][1][name]) > 0.9, name


@pytest.mark.parametrize("kernel", ["triton", "triton-fp8"])
def test_the_loss_kernel_is_its_twin(gpu, kernel):
    pytest.importorskip("nanochat.gpu_kernels")
    from nanochat.loss_head import head_loss

    if kernel == "triton-fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs sm_89")
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1000, 256, device="cuda", generator=g, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(4096, 256, device="cuda", generator=g) / 16).requires_grad_()
    targets = torch.randint(-1, 4090, (1000,), device="cuda", generator=g)
    found = {}
    for name in ("plain", kernel):
        with gpu.autocast():
            loss = head_loss(x, weight, targets, 4090, name)
        found[name] = loss, *torch.autograd.grad(loss, (x, weight))
    assert found[kernel][0].item() == pytest.approx(found["plain"][0].item(), rel=2e-2)
    for a, b in zip(found[kernel][1:], found["plain"][1:]):
        assert cosine(a, b) > (0.99 if kernel == "triton-fp8" else 0.999)


def test_the_mlp_kernel_is_its_twin(gpu):
    pytest.importorskip("nanochat.gpu_mlp")
    from nanochat.mlp_kernel import mlp

    g = torch.Generator("cuda").manual_seed(0)
    sizes = (1000, 256), (1024, 256), (256, 1024)
    x, up, down = ((torch.randn(s, device="cuda", generator=g) / s[-1] ** 0.5).requires_grad_() for s in sizes)
    rows, found = x.bfloat16(), {}
    for name in ("plain", "triton"):
        with gpu.autocast():
            y = mlp(rows, up, down, name)
        found[name] = y, *torch.autograd.grad(y.float().square().sum(), (x, up, down), retain_graph=True)
    assert all(cosine(a, b) > 0.999 for a, b in zip(*found.values()))


def test_cuda_graphs_change_no_episode(gpu, tmp_path, monkeypatch):
    """Losses, gradient norms and weights, with observations in the order that a replay would spoil."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = GPTConfig(sequence_len=128, vocab_size=1024, n_layer=2, n_head=2, n_kv_head=2, n_embd=256)
    cache, found = random_cache(config), {}
    base = partial(uniform_base, lr=1e-3, weight_decay=1e-2)
    schedule = {"warmup_ratio": 0.0, "warmdown_ratio": 0.4, "final_lr_frac": 0.0, "final_wd_frac": 0.0}
    made_of = {"batch_size": 8, "probe_batches": 2, "make_optimizer": base, "schedule": schedule, "seed": 0}
    for graphs in (False, True):
        task = PretrainTask(config, cache, gpu, num_steps=12, cuda_graphs=graphs, **made_of)
        task.reset(0, range(3))
        multipliers, seen = {"*": {"lr": torch.tensor([0.5, 1.0, 2.0])}}, []
        for first in (0, 6):
            task.train(first, 6, multipliers)
            seen += [task.observe([name])[name].cpu() for name in ("probe_loss", "train_loss", "grad_norm")]
        found[graphs] = torch.stack(seen), [p.detach().cpu().clone() for p in task.model.parameters()]
        task.close()
    torch.testing.assert_close(found[True][0], found[False][0], rtol=1e-2, atol=1e-2)
    assert all(cosine(a, b) > 0.999 for a, b in zip(found[True][1], found[False][1]))


def make_judge(model: GPT, compute: Compute) -> UpdateJudge:
    class NoSecondLook:
        def __init__(self):
            self.compute, self.optimizer = compute, None

        def training_loss(self, batches):
            return 1.0

    class Loader:
        micro_steps = 0

    return UpdateJudge(DivergenceGuard(8), model, NoSecondLook(), Loader(), Progress(), False, late=True)


def test_nothing_waits_for_the_gpu_before_the_optimizer_step(gpu):
    model = model_on("cuda")
    forward, optimizer = model.prepare(), model.setup_optimizer(weight_decay=0.1)
    judge, batches = make_judge(model, gpu), [tuple(t.cuda() for t in batch())]
    for step in range(4):
        judge.start_clock()
        judge.expect(step, {}, {})
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps compile
        try:
            train_step(forward, optimizer, batches, gpu, accept=judge)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen = list(judge.look(everything=step == 3))
        assert len(seen) == (0 if step == 0 else 2 if step == 3 else 1)
    assert all(s.verdict is Verdict.TAKE and s.seconds > 0 for s in seen)


def test_a_gradient_that_is_not_finite_leaves_finite_weights(gpu):
    model = model_on("cuda")
    optimizer, judge = model.setup_optimizer(weight_decay=0.1), make_judge(model, gpu)
    judge.expect(0, {}, {})
    train_step(lambda x, y: model(x, y) * float("nan"), optimizer, [tuple(t.cuda() for t in batch())], gpu, judge)
    (seen,) = judge.look(everything=True)
    assert seen.verdict is Verdict.SKIP_SPIKE and all(p.isfinite().all() for p in model.parameters())


def test_resumed_on_the_gpu(base, corpus):
    """12 steps = 6, a death, 6 more, up to the rounding that a GPU may order differently."""
    flags = ["--preset", "smoke", "--data", str(corpus), "--device-type", "cuda", "--save-every", "6"]
    results = []
    for tag in ("gpu-whole", "gpu-torn"):
        run_script(base, "scripts.base_train", *flags, "--model-tag", tag, check=True)
    (base / "runs" / "gpu-torn" / "result.json").unlink()
    again = run_script(base, "scripts.base_train", *flags, "--model-tag", "gpu-torn", "--resume", "auto", check=True)
    assert "resumed at step 6" in again.stdout
    for tag in ("gpu-whole", "gpu-torn"):
        results.append(json.loads((base / "runs" / tag / "result.json").read_text()))
        log = [json.loads(line) for line in (base / "runs" / tag / "log.jsonl").read_text().splitlines()]
        steps = [r for r in log if "loss" in r]
        assert [r["step"] for r in steps] == list(range(12)) and all(r["peak_memory_mb"] > 0 for r in steps)
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_two_gpus_are_one(base, corpus):
    flags = ["--preset", "smoke", "--data", str(corpus), "--device-type", "cuda", "--device-batch-size", "2"]
    run_script(base, "scripts.base_train", *flags, "--model-tag", "one-gpu", check=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base)}
    command = [*launch, "scripts.base_train", *flags, "--model-tag", "two-gpus"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((base / "runs" / t / "result.json").read_text()) for t in ("one-gpu", "two-gpus"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-2)


def test_memory_grows_in_place(gpu):
    x = torch.empty(64 << 20, device="cuda")
    assert any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()), x.shape
