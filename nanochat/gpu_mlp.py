"""The relu^2 MLP with Triton kernels for its activation, as operators of PyTorch.

relu(h)^2 is written over h, the product that it is made of. It is the only thing of the hidden width that is kept for
backward: the gradient of the second matrix needs it as it is, and that of h needs relu(h), which is its square root.

Importing this module needs the `triton` package; `nanochat.mlp_kernel` imports it when the kernel is chosen.
R runs, N tokens, C width, F hidden width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nanochat.gpu_kernels import product

BLOCK, NUM_WARPS = 4096, 8  # elements of a program: 16 a thread, two loads of 16 bytes in bf16


@triton.jit
def relu_squared(h, n, BLOCK: tl.constexpr):
    """relu(h)^2 over h, n elements. Not a number stays so: the guard against divergence must see it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(h + i, mask=i < n, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)
    tl.store(h + i, (x * x).to(h.dtype.element_ty), mask=i < n)


@triton.jit
def relu_squared_gradient(y, grad, n, BLOCK: tl.constexpr):
    """Over the gradient of y = relu(h)^2 that of h: `2 relu(h) grad`, n elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    relu = tl.sqrt(tl.load(y + i, mask=i < n, other=0.0).to(tl.float32))
    g = tl.load(grad + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(grad + i, (2.0 * relu * g).to(grad.dtype.element_ty), mask=i < n)


def _launch(kernel, *tensors: Tensor) -> None:
    """The kernel over all elements of contiguous tensors of one size."""
    n = tensors[0].numel()
    kernel[(triton.cdiv(n, BLOCK),)](*tensors, n, BLOCK=BLOCK, num_warps=NUM_WARPS)


# -----------------------------------------------------------------------------
# operators: torch.compile takes each as it is, without looking inside


@torch.library.custom_op("nanochat::relu2_mlp", mutates_args=())
def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, N, C), up (R, F, C), down (R, C, F) -> output (R, N, C) and relu^2 (R, N, F), in the dtype of x."""
    with torch.autocast(x.device.type, enabled=False):
        y = product(x, up.to(x.dtype).mT)
        _launch(relu_squared, y)
        return product(y, down.to(x.dtype).mT), y


@relu2_mlp.register_fake
def _(x, up, down):
    return torch.empty_like(x), x.new_empty(*x.shape[:2], up.size(1))


@torch.library.custom_op("nanochat::relu2_mlp_gradients", mutates_args=())
def relu2_mlp_gradients(grad: Tensor, x: Tensor, up: Tensor, down: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x in its dtype, and of up and down in fp32, given that of the output (R, N, C)."""
    with torch.autocast(x.device.type, enabled=False):
        grad = grad.to(x.dtype)
        grad_down = product(grad.mT, y, torch.float32)
        grad_h = product(grad, down.to(x.dtype))
        _launch(relu_squared_gradient, y, grad_h)
        return product(grad_h, up.to(x.dtype)), product(grad_h.mT, x, torch.float32), grad_down


@relu2_mlp_gradients.register_fake
def _(grad, x, up, down, y):
    weights = (torch.empty_like(t, dtype=torch.float32) for t in (up, down))
    return torch.empty_like(x), *weights


# -----------------------------------------------------------------------------
# autograd


def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`nanochat.cpu_kernels.plain_mlp`: x (N, C), up (F, C), down (C, F) -> (N, C); or all with a leading axis R."""
    return FusedMLP.apply(x, up, down) if x.dim() == 3 else FusedMLP.apply(x[None], up[None], down[None])[0]


class FusedMLP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """x (R, N, C), up (R, F, C), down (R, C, F) -> (R, N, C)."""
        out, y = relu2_mlp(x, up, down)
        ctx.save_for_backward(x, up, down, y)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, up, down, y = ctx.saved_tensors
        grad_x, grad_up, grad_down = relu2_mlp_gradients(grad, x, up, down, y)
        return grad_x, grad_up.to(up.dtype), grad_down.to(down.dtype)
