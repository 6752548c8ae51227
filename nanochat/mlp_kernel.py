"""Which form of the relu^2 MLP is used: the plain one, or the Triton kernels of `nanochat/gpu_mlp.py`.

R runs (None for one model), N tokens, C width, F hidden width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nanochat import cpu_kernels
from nanochat.common import UserError
from nanochat.kernel_choice import fastest

MLPS = ("auto", "plain", "triton")
MEASURED_TOKENS = 1 << 15  # a choice of the kernel is made with at most so many, over all runs
TOLERANCE = 0.02  # relative error of a kernel in bf16 against the plain form


def mlp(x: Tensor, up: Tensor, down: Tensor, kernel: str = "plain") -> Tensor:
    """`relu(x up^T)^2 down^T`: x (N, C), up (F, C), down (C, F) -> (N, C); with runs all have a leading axis R."""
    if kernel == "triton":
        from nanochat.gpu_mlp import fused_mlp

        return fused_mlp(x, up, down)
    return cpu_kernels.mlp(x, up, down)


def mlp_kernel_for(
    device_type: str, compiled: bool, shape: tuple[int | None, int, int, int], asked: str = "auto"
) -> str:
    """The kernel of `mlp` on this device, for `shape`: R or None, N, C, F.

    "auto" on CUDA: the faster one, by a measurement that is printed. Raises `UserError` for one that is not there.
    """
    names = ["plain"]
    if device_type == "cuda" and importlib.util.find_spec("triton") is not None:
        names = ["plain", "triton"]
    if asked in names:
        return asked
    if asked != "auto":
        raise UserError(f"MLP kernel {asked!r} is not available here; there is {', '.join(names)}")
    (R, N, *sizes) = shape
    return (
        measured_mlp((R, min(N, max(1, MEASURED_TOKENS // (R or 1))), *sizes), compiled) if len(names) > 1 else "plain"
    )


@cache
def measured_mlp(shape: tuple[int | None, int, int, int], compiled: bool, rounds: int = 10) -> str:
    """The faster form of an MLP in bf16, forward and backward, on this GPU; the plain form as it will be used."""
    R, N, C, F = shape
    device, lead = torch.device("cuda", torch.cuda.current_device()), () if R is None else (R,)
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(*lead, N, C, generator=g, device=device, dtype=torch.bfloat16).requires_grad_()
    weights = [(*lead, F, C), (*lead, C, F)]
    up, down = (torch.randn(s, generator=g, device=device).mul_(s[-1] ** -0.5).requires_grad_() for s in weights)
    grad = torch.randn(x.shape, generator=g, device=device, dtype=torch.bfloat16)

    def run(kernel: str) -> Callable[[], tuple[Tensor, ...]]:
        def mlp_of(x, up, down):
            return mlp(x, up, down, kernel)

        f = torch.compile(mlp_of, dynamic=False, fullgraph=True) if compiled else mlp_of

        def forward_backward():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y = f(x, up, down)
            return (y.detach(), *torch.autograd.grad(y, (x, up, down), grad))

        return forward_backward

    return fastest("MLP", {name: run(name) for name in ("plain", "triton")}, "plain", TOLERANCE, rounds)
