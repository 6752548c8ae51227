"""Losses of other packages behind `nanochat.loss_head`: Liger's fused linear cross-entropy, and cut-cross-entropy.

Either is imported when it is chosen (`pip install liger-kernel cut-cross-entropy`, the extra `gpu`). Both are called in
eager mode: they ask the device how many targets count and wait for the answer, which no compiled graph can hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from nanochat.common import UserError

PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}  # a kernel's name, and what it imports
LOGITS_HELD = (
    1 << 30
)  # logits that a kernel may hold at a time, 2 GB in bf16; the fewer chunks, the larger the products


def package_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, kernel: str, reduction: str) -> Tensor:
    """x (N, C), weight (V, C), targets (N,) -> the mean loss (), or losses (N,) for "none", in fp32.

    Targets of -1 are left out, logits are capped at +-`softcap`. Products are in the dtype of x. The weight's gradient
    is summed in fp32 where the package can, and rounded to the dtype of x once. Raises `UserError` for R runs.
    """
    if x.dim() != 2:
        raise UserError(f"{kernel} takes one model, not runs side by side")
    call = {"liger": _liger, "cce": _cut_cross_entropy}[kernel]
    with torch.autocast(x.device.type, enabled=False):
        return call(x, weight.to(x.dtype), targets, softcap, reduction).float()


def _liger(x, weight, targets, softcap, reduction):
    f = _function("liger")
    more = _taken(f, accum_dtype=torch.float32, chunk_mem_const=max(1, LOGITS_HELD // x.numel()))
    return f(x, weight, targets, ignore_index=-1, softcap=softcap, reduction=reduction, **more)


def _cut_cross_entropy(x, weight, targets, softcap, reduction):
    """Without its filter, which leaves out gradients below 2^-12: early in training that is most of a softmax."""
    f = _function("cce")
    more = _taken(f, accum_e_fp32=True, accum_c_fp32=True)
    return f(x, weight, targets, ignore_index=-1, softcap=softcap, reduction=reduction, filter_eps=None, **more)


@cache
def _function(kernel: str) -> Callable:
    if kernel == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _taken(f: Callable, **options) -> dict:
    """Those options that this version of the package knows."""
    return {name: value for name, value in options.items() if name in inspect.signature(f).parameters}
