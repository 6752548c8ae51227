"""The head of the model: projection, softcap and cross-entropy.

R runs, N tokens, C width, V vocabulary. Logits are at least fp32 and capped at +-15: `15 * tanh(logits / 15)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SOFTCAP = 15.0
CHUNK_ELEMENTS = 1 << 22  # logits held at a time by the chunked form: 16 MB. With fewer, the weights are read too often


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, C), (V, C) -> (N, V) in fp32 (a float64 model keeps float64); with runs (R, N, C), (R, V, C) -> (R, N, V)."""
    logits = x @ weight.mT
    return SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / SOFTCAP)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-token losses (..., N) of capped logits (..., N, V); 0 where the target is -1."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none").view(targets.shape)


def mean_loss(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose target is not -1: (..., N) -> (...)."""
    return losses.sum(-1) / (targets >= 0).sum(-1)


class ChunkedLoss(torch.autograd.Function):
    """Mean softcapped cross-entropy without ever holding the full logits, forward and gradient in one sweep.

    Twin of `mean_loss(cross_entropy(softcapped_logits(x, w), t), t)`. The gradient of the capped logits is
    `(softmax - onehot) * (1 - tanh^2)`, so each chunk is worked up in place.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x (R, N, C), weight (R, V, C), targets (R, N) -> (R,) mean losses."""
        R, N, _ = x.shape
        V = weight.size(1)
        scale = (targets >= 0).sum(-1).to(x.dtype).reciprocal()                  # (R,)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        total = x.new_zeros(R)
        rows = max(1, CHUNK_ELEMENTS // (R * V))
        for i in range(0, N, rows):
            x_i, t_i = x[:, i:i + rows], targets[:, i:i + rows, None]            # (R, n, C), (R, n, 1)
            z = torch.bmm(x_i / SOFTCAP, weight.mT).tanh_()                      # (R, n, V), logits / 15
            g = (z * SOFTCAP).exp_()                                  # capped at e^15: no maximum to subtract
            sums = g.sum(-1, keepdim=True)
            valid, t_i = t_i >= 0, t_i.clamp_min(0)
            z_t, share = z.gather(-1, t_i), valid * scale[:, None, None]
            total += ((sums.log() - SOFTCAP * z_t) * valid).sum((1, 2))
            g.mul_(share / sums).addcmul_(g, z.square_(), value=-1)
            g.scatter_add_(-1, t_i, (z_t.square_() - 1) * share)
            grad_x[:, i:i + rows] = torch.bmm(g, weight)
            grad_w.baddbmm_(g.mT, x_i)
        ctx.save_for_backward(grad_x, grad_w)
        return total * scale

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad_x, grad_w = ctx.saved_tensors
        grad = grad[:, None, None]
        return grad_x * grad, grad_w * grad, None
