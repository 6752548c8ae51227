"""The head of the model: projection, softcap and cross-entropy.

R runs, N tokens, C width, V vocabulary. Logits are at least fp32 and capped at +-15: `15 * tanh(logits / 15)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SOFTCAP = 15.0
CHUNK_ELEMENTS = 1 << 22  # logits held at a time by the chunked form: 16 MB. With fewer, the weights are read too often


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, C), (V, C) -> (N, V) in fp32 (a float64 model keeps float64); with runs (R, N, C), (R, V, C) -> (R, N, V)."""
    logits = x @ weight.mT
    return SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-token losses (..., N) of capped logits (..., N, V); 0 where the target is -1."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none").view(
        targets.shape
    )


def mean_loss(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose target is not -1: (..., N) -> (...)."""
    return losses.sum(-1) / (targets >= 0).sum(-1)


class ChunkedLoss(torch.autograd.Function):
    """Mean softcapped cross-entropy without ever holding the full logits, forward and gradient in one sweep.

    Twin of `mean_loss(cross_entropy(softcapped_logits(x, w), t), t)`. With z the sigmoid of 2/15 of a logit the capped
    one is `15 (2 z - 1)`, and its gradient `(softmax - onehot) 4 z (1 - z)`: on a CPU a sigmoid costs a quarter of a tanh,
    and a power of 2 three fifths of one of e.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x (R, N, C), weight (R, V, C), targets (R, N) -> (R,) mean losses."""
        R, N, _ = x.shape
        V = weight.size(1)
        scale = (targets >= 0).sum(-1).to(x.dtype).reciprocal()  # (R,)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        total = x.new_zeros(R)
        rows = max(1, CHUNK_ELEMENTS // (R * V))
        for i in range(0, N, rows):
            x_i, t_i = x[:, i : i + rows], targets[:, i : i + rows, None]  # (R, n, C), (R, n, 1)
            valid, t_i = t_i >= 0, t_i.clamp_min(0)
            z = torch.bmm(x_i * (2 / SOFTCAP), weight.mT).sigmoid_()  # (R, n, V)
            g = (z * (2 * SOFTCAP / math.log(2))).exp2_()  # at most e^30: no maximum to subtract
            sums, z_t = g.sum(-1, keepdim=True), z.gather(-1, t_i)
            total += ((sums.log() - 2 * SOFTCAP * z_t) * valid).sum((1, 2))
            g.mul_(z).addcmul_(g, z, value=-1).scatter_add_(-1, t_i, sums * z_t * (z_t - 1))
            share = valid * (4 * scale[:, None, None]) / sums  # what a row of g still lacks; 0 if left out
            grad_x[:, i : i + rows] = torch.bmm(g, weight) * share
            grad_w.baddbmm_(g.mT, x_i * share)
        ctx.save_for_backward(grad_x, grad_w)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        grad_x, grad_w = ctx.saved_tensors
        grad = grad[:, None, None]
        return grad_x * grad, grad_w * grad, None
