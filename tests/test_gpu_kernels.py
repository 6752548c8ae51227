"""The Triton kernel of the loss against the plain form, on a GPU or in Triton's interpreter; float8.

And what all kernels compile to.

R runs, N tokens, C width, P = V padded, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from nanochat import loss_head as head
from nanochat.float8 import float8_product, to_float8
from tests.conftest import ROOT

pytest.importorskip("triton", reason="triton is not installed (it comes with pip install -e .[dev] on Linux)")
from nanochat import gpu_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter, see conftest.py


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Rows of several blocks, and chunks of four rows for two runs."""
    monkeypatch.setattr(gpu_kernels, "BLOCK", 64)
    monkeypatch.setattr(gpu_kernels, "CHUNK_ELEMENTS", 2 * 192 * 4)


def draw(R, N, C, P, V, dtype=torch.float32, seed=0):
    """x, weight, targets of which a fifth is -1; logits reach well beyond the cap."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(R, N, C, generator=g).mul(3), torch.randn(R, P, C, generator=g)
    targets = torch.randint(V, (R, N), generator=g)
    targets[:, 2], targets[:, -1] = -1, V - 1
    return x.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE).requires_grad_(), targets.to(DEVICE)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


SHAPES = {
    "one run": (1, 7, 16, 64, 64),
    "runs, padded": (2, 9, 16, 192, 150),
    "less than a block": (1, 5, 16, 64, 33),
    "a block and a bit": (1, 4, 16, 128, 65),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_the_plain_form(shape, reduction):
    """Losses to 1e-5 (they reach 30), gradients to 1e-6 of their norm, each run with a weight of its own in the sum."""
    x, weight, targets = draw(*SHAPES[shape])
    share = torch.randn((len(x),) if reduction == "mean" else targets.shape, device=DEVICE)
    results = []
    for kernel in ("plain", "triton"):
        loss = head.head_loss(x, weight, targets, SHAPES[shape][-1], kernel, reduction)
        results.append((loss, *torch.autograd.grad((loss * share).sum(), (x, weight))))
    (plain, *wanted), (ours, *found) = results
    assert ours.shape == plain.shape and ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 if DEVICE == "cpu" else 1e-4)
    for a, b in zip(found, wanted):
        assert relative(a, b) < (1e-6 if DEVICE == "cpu" else 1e-4) and a.dtype == b.dtype == torch.float32
    assert not found[1][:, SHAPES[shape][-1] :].any() and not found[0][:, 2].any()


def test_without_gradients_and_of_one_model():
    x, weight, targets = draw(1, 9, 16, 64, 50)
    with torch.no_grad():
        for reduction in ("mean", "none"):
            one = [head.head_loss(x[0], weight[0], targets[0], 50, k, reduction) for k in ("plain", "triton")]
            torch.testing.assert_close(one[1], one[0], rtol=0, atol=1e-5)


def test_in_bf16_the_kernel_is_as_right_as_the_plain_form():
    """Against the plain form in fp32 of the same bf16 numbers: no worse than the plain form under autocast."""
    x, weight, targets = draw(1, 40, 64, 192, 192, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in (x, weight.bfloat16())]
    wanted = torch.autograd.grad(head.head_loss(*exact, targets, 192).sum(), exact)
    errors = {}
    for kernel in ("plain", "triton"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = head.head_loss(x, weight, targets, 192, kernel)
        grads = torch.autograd.grad(loss.sum(), (x, weight))
        assert grads[0].dtype == torch.bfloat16 and grads[1].dtype == torch.float32
        errors[kernel] = [relative(a, b) for a, b in zip(grads, wanted)]
    assert all(t < 1.1 * p + 1e-3 for p, t in zip(errors["plain"], errors["triton"])), errors


def test_a_run_that_breaks_leaves_the_others_untouched():
    x, weight, targets = draw(2, 9, 16, 192, 150)
    wanted = head.head_loss(x, weight, targets, 150, "triton").detach()
    with torch.no_grad():
        weight[1, 0, 0] = float("nan")
    found = head.head_loss(x, weight, targets, 150, "triton")
    grads = torch.autograd.grad(found.sum(), (x, weight))
    assert found[0] == wanted[0] and found[1].isnan() and all(g[0].isfinite().all() for g in grads)


@pytest.mark.parametrize("op", ["head_losses", "head_gradients"])
def test_operators_are_what_they_say_to_the_compiler(op):
    """PyTorch's own check: the schema, the shapes without data, and the operator under torch.compile's tracing."""
    x, weight, targets = (t.detach() for t in draw(2, 3, 16, 64, 60))
    more = (60,) if op == "head_losses" else (torch.rand(2, 3, device=DEVICE), 60, False)
    torch.library.opcheck(getattr(torch.ops.nanochat, op).default, (x, weight, targets, *more))


# -----------------------------------------------------------------------------
# float8


def slow_float8(x, scale):
    """x / scale to 4 significant bits, exponents from -6 (below it multiples of 2^-9), at most 448; halves to even."""
    y = (x / scale).double()
    step = 2.0 ** (torch.frexp(y).exponent.clamp(min=-5) - 4).double()
    return ((y / step).round() * step).clamp(-448, 448)


def test_float8_rounds_to_four_bits():
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 1, 32)
    rounded, scale = to_float8(x)
    assert rounded.float().abs().max() == 448 and scale == x.abs().max() / 448
    assert torch.equal(rounded.double(), slow_float8(x, scale))
    assert not to_float8(torch.zeros(2, 16))[0].float().any()


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no products in float8"
)
def test_float8_head():
    """The product is that of the rounded numbers; the head's loss moves by less than the rounding allows."""
    x, weight, targets = draw(1, 32, 64, 64, 64)
    a, b = (t[0].detach().bfloat16() for t in (x, weight))
    (a8, sa), (b8, sb) = to_float8(a), to_float8(b)
    wanted = (a8.double() * sa) @ (b8.double() * sb).mT
    assert relative(float8_product(a, b), wanted) < 4e-3  # of rounding to bf16
    losses = {k: head.head_loss(x.bfloat16(), weight, targets, 64, k).item() for k in ("triton", "triton-fp8")}
    assert 0 < abs(losses["triton-fp8"] - losses["triton"]) < 0.05 * losses["triton"]


# -----------------------------------------------------------------------------
# what it compiles to

COMPILE = """
import json, subprocess, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat import gpu_kernels, gpu_mlp
loss = {"logits": "*bf16", "targets": "*i64", "factors": "*fp32", "losses": "*fp32", "V": "i32", "P": "i32"}
cases = {}  # kernel, types, constants, warps
for gradient in (False, True):
    constants = {"GRADIENT": gradient, "BLOCK": gpu_kernels.BLOCK}
    cases[f"loss {gradient}"] = gpu_kernels.softcap_cross_entropy, loss, constants, gpu_kernels.NUM_WARPS
constants = {"BLOCK": gpu_mlp.BLOCK}
cases["relu2"] = gpu_mlp.relu_squared, {"h": "*bf16", "n": "i32"}, constants, gpu_mlp.NUM_WARPS
types = {"y": "*bf16", "grad": "*bf16", "n": "i32"}
cases["relu2 gradient"] = gpu_mlp.relu_squared_gradient, types, constants, gpu_mlp.NUM_WARPS
found = {}
for capability in (80, 90):
    for name, (kernel, types, constants, warps) in cases.items():
        source = ASTSource(
            kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants,
            {(i,): [["tt.divisibility", 16]] for i in range(len(types))},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
            f.write(compiled.asm["ptx"])
            f.flush()
            arch = "sm_90a" if capability == 90 else f"sm_{capability}"
            command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name", arch, f.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[f"{name} sm_{capability}"] = len(compiled.asm["cubin"]), warps, said, compiled.asm["ptx"]
print(json.dumps(found))
"""


def test_kernels_compile_for_a100_and_h100_without_spills(tmp_path):
    """Offline, by the compiler that comes with Triton: machine code, no spilled registers, full occupancy."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 8
    for name, (size, warps, said, ptx) in found.items():
        assert size > 1000 and "0 bytes spill stores, 0 bytes spill loads" in said, (name, said)
        registers = int(said.split("Used ")[1].split()[0])
        assert registers * 32 * warps * 6 <= 65536, (name, said)  # 6 programs a multiprocessor
        if name.startswith("relu2"):  # 8 elements in bf16 a load, the widest there is
            assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, name
