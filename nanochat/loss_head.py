"""The head of the model: projection, softcap and cross-entropy, in the plain form and by kernels that equal it.

R runs, N tokens, C width, V vocabulary, P = V padded, the rows that the weight has. Logits are in fp32 or wider and
capped at +-15: `15 * tanh(logits / 15)`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanochat.common import UserError
from nanochat.kernel_choice import fastest
from nanochat.loss_packages import PACKAGES, package_loss

SOFTCAP = 15.0
LOSSES = ("auto", "plain", "chunked", "triton", "triton-fp8", *PACKAGES)
MEASURED_TOKENS = 1 << 15  # a choice of the kernel is made with at most so many, over all runs
TOLERANCE = 0.02  # relative error of a kernel in bf16 against the plain form
CHUNK_ELEMENTS = 1 << 22  # logits that `ChunkedLoss` holds at a time: 16 MB; smaller chunks read the weights more often


def head_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab: int,
    kernel: str = "plain",
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss of x (N, C) under weight (P, C) and targets (N,), or of R runs: (R, N, C), (R, P, C), (R, N).

    Mean over the tokens whose target is not -1, () or (R,); with `reduction` "none" losses (N,) or (R, N), 0 where the
    target is -1. `kernel`: "plain" keeps the logits, as autograd or torch.compile will have them; "chunked" is
    `ChunkedLoss` where a mean is differentiated, else plain; "triton" is `nanochat/gpu_kernels.py`, and "triton-fp8"
    the same with the logits' product in float8 in training; "liger" and "cce" are `nanochat/loss_packages.py`, for one
    model, and plain where losses per token are differentiated, which some versions of Liger do wrongly.
    """
    if kernel.startswith("triton"):
        from nanochat.gpu_kernels import fused_loss

        rows = (x, weight, targets) if x.dim() == 3 else (x[None], weight[None], targets[None])
        loss = fused_loss(*rows, vocab, reduction, float8=kernel == "triton-fp8")
        return loss if x.dim() == 3 else loss[0]
    weight = weight[..., :vocab, :] if weight.size(-2) > vocab else weight
    if kernel in PACKAGES and (reduction == "mean" or not torch.is_grad_enabled()):
        return package_loss(x, weight, targets, SOFTCAP, kernel, reduction)
    if kernel == "chunked" and reduction == "mean" and torch.is_grad_enabled():
        if x.dim() == 2:
            return ChunkedLoss.apply(x[None], weight[None], targets[None])[0]
        return ChunkedLoss.apply(x, weight, targets)
    losses = cross_entropy(softcapped_logits(x, weight), targets)
    return losses if reduction == "none" else mean_loss(losses, targets)


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


# -----------------------------------------------------------------------------
# the choice


def loss_kernel_for(
    device_type: str, compiled: bool, shape: tuple[int | None, int, int, int, int], asked: str = "auto"
) -> str:
    """The kernel of `head_loss` on this device, for `shape`: R or None, N, C, P, V.

    "auto" on a CPU: "chunked" in eager mode, "plain" where it is compiled. "auto" on CUDA: the fastest of what is
    there, float8 left out, by a measurement that is printed. Raises `UserError` for one that is not there.
    """
    cuda, (R, N, *sizes) = device_type == "cuda", shape
    names, measured = ["plain", "chunked"], ["plain"]
    if cuda and importlib.util.find_spec("triton") is not None:
        packages = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is not None]
        measured = ["triton", "plain", *packages]
        names += ["triton", *(packages if R is None else [])]
        if R is None and torch.cuda.get_device_capability() >= (8, 9):
            names += ["triton-fp8"]
    if asked in names:
        return asked
    if asked != "auto":
        raise UserError(f"loss kernel {asked!r} is not available here; there is {', '.join(names)}")
    if not cuda:
        return "plain" if compiled else "chunked"
    if len(measured) == 1:
        return "plain"
    return measured_loss((R, min(N, max(1, MEASURED_TOKENS // (R or 1))), *sizes), compiled, tuple(measured))


@cache
def measured_loss(
    shape: tuple[int | None, int, int, int, int], compiled: bool, names: tuple[str, ...], rounds: int = 10
) -> str:
    """The fastest of `names` for a mean loss in bf16 and its gradients, on this GPU; each as it will be used."""
    R, N, C, P, V = shape
    device, lead = torch.device("cuda", torch.cuda.current_device()), () if R is None else (R,)
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(*lead, N, C, generator=g, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(*lead, P, C, generator=g, device=device).mul_(C**-0.5).requires_grad_()
    targets = torch.randint(V, (*lead, N), generator=g, device=device)

    def run(kernel: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        def loss_of(x, weight):
            return head_loss(x, weight, targets, V, kernel).sum()

        in_graph = compiled and kernel not in PACKAGES
        f = torch.compile(loss_of, dynamic=False, fullgraph=True) if in_graph else loss_of

        def forward_backward():
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = f(x, weight)
            return (loss.detach(), *torch.autograd.grad(loss, (x, weight)))

        return forward_backward

    return fastest("loss", {name: run(name) for name in names}, "plain", TOLERANCE, rounds)
