"""RMSNorm, rotary embedding, MLP and residual mix, with backward passes written by hand for eager mode on a CPU.

Eager autograd writes every intermediate of a formula to memory and keeps most of them for backward; on a CPU this takes
most of a small step's time. The hand-written forms keep few tensors, among them outputs that the next matrix product
keeps anyway. The plain forms define what is computed and are used everywhere else: `torch.compile` fuses them, and
their accumulation in bf16 is wider.

T time, H heads, D head dim, C channels, F hidden width of the MLP; leading axes are free.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def by_hand(x: Tensor) -> bool:
    """Whether to use the hand-written form: in eager mode, on a CPU, for fp32 or wider."""
    return x.device.type == "cpu" and x.element_size() >= 4 and not torch.compiler.is_compiling()


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without a learned scale."""
    return _Norm.apply(x) if by_hand(x) else plain_norm(x)


def rotary_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, H, D), split in halves, by minus theta; then RMSNorm over D. cos, sin (T, H, D/2) in fp32."""
    return _RotaryNorm.apply(x, cos, sin) if by_hand(x) else plain_rotary_norm(x, cos, sin)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`relu(x up^T)^2 down^T`: x (N, C), up (F, C), down (C, F) -> (N, C); with runs all have a leading axis R."""
    return _MLP.apply(x, up, down) if by_hand(x) else plain_mlp(x, up, down)


def mix(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a x + b y` for x, y (..., T, C) and scalars a, b (1, 1, 1), or a pair per run (R, 1, 1, 1)."""
    return _Mix.apply(x, y, a, b) if by_hand(x) else plain_mix(x, y, a, b)


# -----------------------------------------------------------------------------
# plain forms


def plain_norm(x):
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)  # autocast makes it fp32 from torch 2.12 on


def plain_rotary_norm(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return plain_norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype))


def plain_mlp(x, up, down):
    return F.relu(x @ up.mT).square() @ down.mT


def plain_mix(x, y, a, b):
    return (a * x + b * y).to(x.dtype)


# -----------------------------------------------------------------------------
# hand-written forms


def reciprocal_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last axis, (..., D) -> (..., 1); eps as in `F.rms_norm`."""
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
    return mean.add_(torch.finfo(x.dtype).eps).rsqrt_()


def norm_backward(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x for y = scale x with mean square 1, given that of y: `scale (grad - y mean(grad y))`."""
    along = (grad * y).mean(-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1).mul_(scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Rotate by minus theta (sign 1) or by theta (sign -1), without the norm."""
    y = x * torch.cat((cos, cos), dim=-1)  # on whole heads: passes over halves are short and slow
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y1.addcmul_(x2, sin, value=sign)
    y2.addcmul_(x1, sin, value=-sign)
    return y


class _Norm(Function):
    @staticmethod
    def forward(ctx, x):
        scale = reciprocal_rms(x)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return norm_backward(grad, *ctx.saved_tensors)


class _RotaryNorm(Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        y = rotate(x, cos, sin, 1)
        scale = reciprocal_rms(y)
        y.mul_(scale)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, scale, cos, sin = ctx.saved_tensors
        return rotate(norm_backward(grad, y, scale), cos, sin, -1), None, None


class _MLP(Function):
    @staticmethod
    def forward(ctx, x, up, down):
        h = (x @ up.mT).relu_()
        squared = h * h
        ctx.save_for_backward(x, up, down, h, squared)
        return squared @ down.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, up, down, h, squared = ctx.saved_tensors
        grad_h = (grad @ (2 * down)).mul_(h)
        return grad_h @ up, grad_h.mT @ x, grad.mT @ squared


class _Mix(Function):
    @staticmethod
    def forward(ctx, x, y, a, b):
        ctx.save_for_backward(x, y, a, b)
        return torch.mul(x, a).addcmul_(y, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, a, b = ctx.saved_tensors
        scalars = [(grad * t).flatten(-3).sum(-1).view(s.shape) for t, s in ((x, a), (y, b))]
        return grad * a, grad * b, *scalars
