"""What would run on a GPU, traced on fake CUDA tensors in a process of its own (`tests/fake_cuda.py`).

One graph and no break for the forward pass; nothing compiled again by a decision; dtypes and devices throughout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch

from tests.conftest import ROOT
from tests.fake_cuda import B, T, V, build

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="this build of PyTorch has CUDA: the branches themselves run"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ for the device guard"),
]
TRITON = importlib.util.find_spec("triton") is not None
FP32 = "['float32', 'cuda']"


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory):
    library = str(build(tmp_path_factory.mktemp("guard")))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def run(*cases: str) -> dict:
        command = [sys.executable, "-m", "tests.fake_cuda", library, *cases]
        result = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=1800)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def check_forward(found: dict, case: str) -> None:
    runs, backend, loss, _ = case.split()
    lead, N = ([] if runs == "one" else [int(runs)]), B * T
    rows = B * (1 if runs == "one" else int(runs))
    assert (found["graphs"], found["breaks"]) == (1, 0), case
    shapes = [lead, lead, lead, [*lead, N], [*lead, B, T, V]]
    assert found["outputs"] == [[shape, "float32", "cuda"] for shape in shapes], case
    assert found["attention"] == [[[rows, T, 2, 128], "bfloat16", "cuda"]] * 3, case
    padded = [*lead, 1024, 256]
    wanted = [[[*lead, N, 256], "bfloat16", "cuda"], [padded, "float32", "cuda"], [[*lead, N], "int64", "cuda"]]
    assert found["head"] == wanted, case


def check_optimizer(found: dict) -> None:
    first, last = found["programs"]
    assert first == last > 0, "a decision compiled an update again"
    assert (found["breaks"], found["weights"], found["state"]) == (0, [FP32], [FP32])


def test_the_branches_of_cuda(fake_cuda):
    """One combination of kernels, and what does not depend on it; all of them under the marker slow."""
    forward = f"one varlen {'triton' if TRITON else 'plain'} training"
    found = fake_cuda(forward, "missing mask", "optimizer 2", *(["loss backward", "head products"] if TRITON else []))
    check_forward(found[forward], forward)
    check_optimizer(found["optimizer 2"])
    assert "no block mask for 512 tokens and a window of 256" in found["missing mask"]["error"]
    if TRITON:
        x, weight = [[2, 8, 64], "bfloat16", "cuda"], [[2, 1024, 64], "float32", "cuda"]
        assert found["loss backward"] == {"loss": [[2], "float32", "cuda"], "grads": [x, weight]}
        for R, tensors in zip((1, 2, 1), found["head products"]["found"], strict=True):
            wanted = ([R, 600], "float32"), ([R, 600, 64], "bfloat16"), ([R, 1024, 64], "float32")
            assert tensors == [[shape, dtype, "cuda"] for shape, dtype in wanted]


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_every_combination_of_kernels_is_one_graph(fake_cuda):
    """FlexAttention in evaluation only: its training graph needs a backward pass at the time of tracing."""
    combinations = product(("one", "2"), ("sdpa", "varlen", "flex"), ("plain", "triton"))
    cases = [f"{r} {a} {k} {'evaluation' if a == 'flex' else 'training'}" for r, a, k in combinations]
    cases.append("one varlen triton-fp8 training")
    found = fake_cuda(*cases, "optimizer one")
    for case in cases:
        check_forward(found[case], case)
    check_optimizer(found["optimizer one"])
