"""Matrix products in float8 e4m3 (4 bits of exponent, 3 of mantissa), scaled so that the largest value is 448."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3fn


def to_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> (x / scale rounded to float8, scale), the scale () in fp32, for the whole tensor."""
    scale = x.abs().amax().float().clamp_min(1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def float8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.mT` of both rounded to float8, accumulated in fp32: a (n, k), b (m, k) -> (n, m) in the dtype of a.

    k and m must be multiples of 16; on CUDA it needs compute capability 8.9. Both tensors are scaled as a whole.
    """
    (a8, scale_a), (b8, scale_b) = to_float8(a), to_float8(b)
    return torch._scaled_mm(a8, b8.mT, scale_a=scale_a, scale_b=scale_b, out_dtype=a.dtype)
