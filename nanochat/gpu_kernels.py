"""Triton kernel of the head: softcap and cross-entropy, forward and backward in one, as operators of PyTorch.

Importing this module needs the `triton` package; `nanochat.loss_head` imports it when the kernel is chosen. With
TRITON_INTERPRET=1 the kernel runs on a CPU, slowly: so the tests compare its numbers with the plain form.

R runs, N tokens, C width, V vocabulary, P = V padded: the rows of the weight and the columns of the logits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nanochat.float8 import float8_product
from nanochat.loss_packages import LOGITS_HELD

BLOCK, NUM_WARPS = 2048, 8  # columns that a program reads at a time: 8 a thread, a load of 16 bytes in bf16
CHUNK_ELEMENTS = LOGITS_HELD

# With z = sigmoid(2/15 logit) the capped logit is 15 (2 z - 1). e^(30 z) is its exponential times e^15, which cancels;
# it is at most e^30, so no maximum need be subtracted: a row's sum is one pass, and its gradient a second one.
SIGMOID = tl.constexpr(-2 / 15 / math.log(2))  # z = 1 / (1 + 2^(SIGMOID logit))
EXP = tl.constexpr(30 / math.log(2))  # e^(30 z) = 2^(EXP z)


@triton.jit
def softcap_cross_entropy(logits, targets, factors, losses, V, P, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each row of `logits` (rows, P), of which V columns count: `losses` (rows,), 0 for targets below 0.

    With GRADIENT, the logits are overwritten by the gradient of the loss times `factors` (rows,), which must be 0 for
    targets below 0. `factors` is not read without.
    """
    row = tl.program_id(0).to(tl.int64)  # a chunk may have more than 2^31 bytes
    logits += row * P
    target = tl.load(targets + row)
    sums = tl.zeros((BLOCK,), tl.float32)
    picked = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32)
        z = 1.0 / (1.0 + tl.exp2(logit * SIGMOID))
        sums += tl.where(column < V, tl.exp2(z * EXP), 0.0)
        picked += tl.where(column == target, z, 0.0)
    total = tl.sum(sums)
    loss = tl.log(total) - 30.0 * tl.sum(picked)
    tl.store(losses + row, tl.where(target >= 0, loss, 0.0))
    if GRADIENT:  # (softmax - onehot) x the cap's derivative 4 z (1 - z)
        factor, share = 4.0 * tl.load(factors + row), 1.0 / total
        for first in range(0, P, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(logits + column, mask=column < V, other=0.0).to(tl.float32)
            z = 1.0 / (1.0 + tl.exp2(logit * SIGMOID))
            g = tl.exp2(z * EXP) * share - tl.where(column == target, 1.0, 0.0)
            g = tl.where(column < V, g * z * (1.0 - z) * factor, 0.0)
            tl.store(logits + column, g.to(logits.dtype.element_ty), mask=column < P)


# -----------------------------------------------------------------------------
# operators: torch.compile takes each as it is, without looking inside


@torch.library.custom_op("nanochat::head_losses", mutates_args=())
def head_losses(x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """x (R, N, C), weight (R, P, C), targets (R, N) -> losses (R, N) in fp32. Products are in the dtype of x."""
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        w = weight.to(x.dtype)
        for part in _chunks(x, w):
            _launch(product(x[:, part], w.mT), targets[:, part], None, losses[:, part], vocab)
    return losses


@head_losses.register_fake
def _(x, weight, targets, vocab):
    return torch.empty(targets.shape, dtype=torch.float32, device=x.device)


@torch.library.custom_op("nanochat::head_gradients", mutates_args=())
def head_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, vocab: int, float8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (R, N), and the gradients of `(factors * losses).sum()`: of x in its dtype, of the weight in fp32.

    factors (R, N) in fp32, 0 where the target is below 0. `float8`: the logits' product in float8, for one run only.
    """
    losses, grad_x, grad_w = torch.empty_like(factors), torch.empty_like(x), None
    with torch.autocast(x.device.type, enabled=False):
        w = weight.to(x.dtype)
        for part in _chunks(x, w):
            logits = float8_product(x[0, part], w[0])[None] if float8 else product(x[:, part], w.mT)
            _launch(logits, targets[:, part], factors[:, part], losses[:, part], vocab)  # logits -> their gradient
            grad_x[:, part] = product(logits, w)
            share = product(logits.mT, x[:, part], torch.float32)
            grad_w = share if grad_w is None else grad_w.add_(share)
            del logits  # before the next chunk's
    return losses, grad_x, grad_w


@head_gradients.register_fake
def _(x, weight, targets, factors, vocab, float8):
    return torch.empty_like(factors), torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def _chunks(x: Tensor, w: Tensor) -> list[slice]:
    """Slices of the tokens whose logits are held at a time, in multiples of 128 where that is possible."""
    rows = max(1, CHUNK_ELEMENTS // (w.size(0) * w.size(1)))
    rows -= rows % 128 if rows > 128 else 0
    return [slice(i, i + rows) for i in range(0, x.size(1), rows)]


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """(R, n, k), (R, k, m) -> (R, n, m), accumulated in fp32 and, if asked for, kept so."""
    if out_dtype is not None and not a.is_cuda:
        a, b, out_dtype = a.to(out_dtype), b.to(out_dtype), None  # PyTorch has such products for CUDA only
    keep = {} if out_dtype in (None, a.dtype) else {"out_dtype": out_dtype}
    return torch.mm(a[0], b[0], **keep)[None] if a.size(0) == 1 else torch.bmm(a, b, **keep)


def _launch(logits: Tensor, targets: Tensor, factors: Tensor | None, losses: Tensor, vocab: int) -> None:
    """The kernel on (R, n) rows; `losses` is written, and with `factors` the logits become their gradient."""
    R, n, P = logits.shape
    found = torch.empty(R, n, dtype=torch.float32, device=logits.device)
    factors = found if factors is None else factors.contiguous()  # a pointer that is not read
    gradient = factors is not found
    softcap_cross_entropy[(R * n,)](
        logits, targets.contiguous(), factors, found, vocab, P, GRADIENT=gradient, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    losses.copy_(found)


# -----------------------------------------------------------------------------
# autograd


def fused_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab: int, reduction: str, float8: bool) -> Tensor:
    """x (R, N, C), weight (R, P, C), targets (R, N) -> mean losses (R,), or per token (R, N) for "none"."""
    if reduction == "mean" and torch.is_grad_enabled():
        return FusedMeanLoss.apply(x, weight, targets, vocab, float8)
    losses = FusedLosses.apply(x, weight, targets, vocab)
    return losses if reduction == "none" else losses.sum(-1) / (targets >= 0).sum(-1)


class FusedMeanLoss(Function):
    """`mean_loss(cross_entropy(softcapped_logits(x, w), t), t)`; the gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, vocab: int, float8: bool) -> Tensor:
        """x (R, N, C), weight (R, P, C), targets (R, N) -> (R,) mean losses."""
        valid = targets >= 0
        factors = valid.float() / valid.sum(-1, keepdim=True)
        losses, grad_x, grad_w = head_gradients(x, weight, targets, factors, vocab, float8)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtype = weight.dtype
        return (losses * factors).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        grad = grad[:, None, None]
        return (grad_x * grad).to(grad_x.dtype), (grad_w * grad).to(ctx.dtype), None, None, None


class FusedLosses(Function):
    """`cross_entropy(softcapped_logits(x, w), t)` per token; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
        """x (R, N, C), weight (R, P, C), targets (R, N) -> (R, N)."""
        ctx.save_for_backward(x, weight, targets)
        ctx.vocab = vocab
        return head_losses(x, weight, targets, vocab)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, targets = ctx.saved_tensors
        factors = torch.where(targets >= 0, grad, 0.0)
        _, grad_x, grad_w = head_gradients(x, weight, targets, factors, ctx.vocab, False)
        return grad_x, grad_w.to(weight.dtype), None, None
