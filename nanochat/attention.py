"""Causal attention with an optional sliding window, by the fastest kernel available.

B batch (runs folded in), T queries, S keys (S >= T while decoding), H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
import torch.nn.functional as F

try:
    from flash_attn_interface import flash_attn_func as flash_attention_3
except ImportError:
    flash_attention_3 = None

FULL = -1  # a window that reaches back to the first token


@cache
def backend_for(device_type: str, compiled: bool) -> str:
    """The kernels used on this device: "fa3", "flex" or "sdpa".

    FlashAttention-3 needs its package and a Hopper GPU. FlexAttention is fast inside `torch.compile` only, where it
    skips the blocks outside the window. SDPA takes a mask for the window.
    """
    if device_type == "cuda":
        if torch.cuda.get_device_capability()[0] == 9 and flash_attention_3 is not None:
            return "fa3"
        if compiled:
            return "flex"
    return "sdpa"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = FULL, backend: str = "sdpa"
) -> torch.Tensor:
    """Attend causally; query i sees itself and the `window` tokens before it (`FULL`: all of them).

    q (B, T, H, D); k, v (B, S, K, D) with H a multiple of K; the last query is aligned with the last key.
    Returns (B, T, H, D).
    """
    T, S = q.size(1), k.size(1)
    if window >= S - 1:
        window = FULL
    if backend == "fa3":
        y = flash_attention_3(q, k, v, causal=True, window_size=(window, 0 if window != FULL else -1))
        return y[0] if isinstance(y, tuple) else y  # older releases return the log-sum-exp too
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    if window == FULL and T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif backend == "flex" and torch.compiler.is_compiling() and T == S and (T, window, q.device) in _block_masks:
        from torch.nn.attention.flex_attention import flex_attention

        y = flex_attention(q, k, v, block_mask=_block_masks[T, window, q.device], enable_gqa=grouped)
    else:
        mask = _mask.__wrapped__ if torch.compiler.is_compiling() else _mask  # torch.compile cannot trace a cache
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(T, S, window, q.device), enable_gqa=grouped)
    return y.transpose(1, 2)


@lru_cache(maxsize=32)
def _mask(T: int, S: int, window: int, device: torch.device) -> torch.Tensor:
    """(T, S) bool, True where query i + S - T may look at key j."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)[None, :]
    return (distance >= 0) & ((distance <= window) if window != FULL else True)


_block_masks: dict[tuple[int, int, torch.device], object] = {}  # by T, window and device


def prepare_block_masks(T: int, windows: list[int], device: torch.device) -> None:
    """Make FlexAttention's masks before compilation; inside the compiled model, every step would make them again."""
    from torch.nn.attention.flex_attention import create_block_mask

    for window in {w for w in windows if 0 <= w < T - 1 and (T, w, device) not in _block_masks}:

        def visible(b, h, i, j, window=window):
            return (i >= j) & (i - j <= window)

        _block_masks[T, window, device] = create_block_mask(visible, None, None, T, T, device=device)
