"""The head of the model: projection, softcap and cross-entropy.

R runs, N tokens, C width, V vocabulary. Logits are in fp32 or wider and capped at +-15: `15 * tanh(logits / 15)`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SOFTCAP = 15.0
CHUNK_ELEMENTS = 1 << 22  # logits that `ChunkedLoss` holds at a time: 16 MB; smaller chunks read the weights more often


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, C), (V, C) -> (N, V) in fp32 (a float64 model keeps float64); with runs (R, N, C), (R, V, C) -> (R, N, V)."""
    logits = x @ weight.mT
    return SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses per token, (..., N), of capped logits (..., N, V); 0 where the target is -1."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none").view(
        targets.shape
    )


def mean_loss(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose target is not -1: (..., N) -> (...)."""
    return losses.sum(-1) / (targets >= 0).sum(-1)


class ChunkedLoss(torch.autograd.Function):
    """Mean softcapped cross-entropy by chunks of rows, so that the full logits are never held.

    The gradients are computed in the forward pass, chunk by chunk.

    Equals `mean_loss(cross_entropy(softcapped_logits(x, w), t), t)`. With z the sigmoid of 2/15 of a logit, the capped
    logit is `15 (2 z - 1)`, and the gradient is `(softmax - onehot) 4 z (1 - z)`. On a CPU a sigmoid takes a quarter of
    the time of a tanh, and exp2 three fifths of that of exp.
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
            g = (z * (2 * SOFTCAP / math.log(2))).exp2_()  # at most e^30, so that no maximum need be subtracted
            sums, z_t = g.sum(-1, keepdim=True), z.gather(-1, t_i)
            total += ((sums.log() - 2 * SOFTCAP * z_t) * valid).sum((1, 2))
            g.mul_(z).addcmul_(g, z, value=-1).scatter_add_(-1, t_i, sums * z_t * (z_t - 1))
            share = (
                valid * (4 * scale[:, None, None]) / sums
            )  # the remaining factor of each row of g; 0 if the target is -1
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
