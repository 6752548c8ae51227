"""Causal attention with an optional sliding window, by the fastest kernel that is installed.

B batch (runs folded in), T queries, S keys (S >= T while decoding), H heads, K kv heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from nanochat.common import UserError, print0
from nanochat.kernel_choice import fastest

FULL = -1  # a window that reaches back to the first token
SHORT = 256  # up to this context SDPA is taken: a mask of so few tokens is small, and every start-up cost is saved
ATTENTIONS = ("auto", "fa3", "varlen", "flex", "sdpa")
FA3_ON_HUB = "kernels-community/flash-attn3"  # its name for the `kernels` package
TOLERANCE = 0.02  # relative error of a kernel in bf16 against SDPA's

flash_attention_3: Callable | None = None  # set by `candidates`


@dataclass(frozen=True)
class Shape:
    """What a model asks of attention: rows B, context T, heads H, kv heads K, head dim D, and each layer's window."""

    B: int
    T: int
    H: int
    K: int
    D: int
    windows: tuple[int, ...]


def backend_for(device_type: str, compiled: bool, shape: Shape | None = None, asked: str = "auto") -> str:
    """The kernels used on this device: "fa3", "varlen", "flex" or "sdpa".

    "auto" is SDPA on a CPU and for a short context. Else, if several are installed, the fastest at `shape`, by a
    measurement that is printed; without a shape the first of `candidates`. `asked` names one; raises `UserError` if it
    is not there.
    """
    cuda, grouped = device_type == "cuda", shape is not None and shape.H != shape.K
    if asked == "auto" and (not cuda or (shape is not None and shape.T <= SHORT)):
        return "sdpa"
    names = candidates(compiled, grouped) if cuda else ["sdpa"]
    if asked in names or (cuda and compiled and asked == "flex"):
        return asked
    if asked != "auto":
        raise UserError(f"attention {asked!r} is not available here; there is {', '.join(names)}")
    return names[0] if shape is None or len(names) == 1 else measured_backend(tuple(names), shape, compiled)


def candidates(compiled: bool, grouped: bool = False) -> list[str]:
    """What can run on this GPU, the likely fastest first.

    fa3: FlashAttention-3, from `flash_attn_interface` or from the cache of the `kernels` package, on a Hopper GPU.
    varlen: torch's FlashAttention-2, where its `varlen_attn` takes a window. flex: FlexAttention, in `torch.compile`
    only, where it skips the blocks outside the window; where one of the others is there, its compilation is not worth
    the wait. sdpa: takes a dense mask for the window.
    """
    global flash_attention_3
    if torch.cuda.get_device_capability()[0] == 9:
        flash_attention_3 = flash_attention_3 or _load_flash_attention_3()
    fast = ["fa3"] * (flash_attention_3 is not None) + ["varlen"] * varlen_has_windows(grouped)
    return [*fast, *(["flex"] if compiled and not fast else []), "sdpa"]


@cache
def _load_flash_attention_3() -> Callable | None:
    if importlib.util.find_spec("flash_attn_interface") is not None:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func
    if importlib.util.find_spec("kernels") is None:
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what its cache holds; set it to 0 to download
    from kernels import get_kernel

    try:
        return get_kernel(FA3_ON_HUB).flash_attn_func
    except Exception as error:  # whatever the package raises: not cached, not built for this torch
        print0(f"attention: the package kernels has no FlashAttention-3 here ({type(error).__name__})")
        return None


@cache
def varlen_has_windows(grouped: bool) -> bool:
    """Whether this torch's `varlen_attn` takes a window, and grouped queries if asked for."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    takes = inspect.signature(varlen_attn).parameters
    return "window_size" in takes and (not grouped or "enable_gqa" in takes)


@cache
def measured_backend(names: tuple[str, ...], shape: Shape, compiled: bool, rounds: int = 10) -> str:
    """The fastest of `names` in bf16 over all layers of a model, forward and backward, on this GPU.

    `compiled`: only those that `torch.compile` takes without breaking its graph.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    if "flex" in names:
        prepare_block_masks(shape.T, list(shape.windows), device)
    g = torch.Generator(device).manual_seed(0)
    sizes = [(shape.B, shape.T, heads, shape.D) for heads in (shape.H, shape.K, shape.K, shape.H)]
    q, k, v, dy = (torch.randn(size, generator=g, device=device, dtype=torch.bfloat16) for size in sizes)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run(name: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        def layers(q, k, v):
            return sum(attention(q, k, v, window, name) for window in shape.windows)

        compiler = "inductor" if name == "flex" else "eager"  # the others are one operator each: nothing to compile
        f = torch.compile(layers, backend=compiler, dynamic=False, fullgraph=True) if compiled else layers

        def forward_backward():
            y = f(*leaves)
            return (y.detach(), *torch.autograd.grad(y, leaves, dy))

        return forward_backward

    return fastest("attention", {name: run(name) for name in names}, "sdpa", TOLERANCE, rounds)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = FULL, backend: str = "sdpa"
) -> torch.Tensor:
    """Attend causally; query i sees itself and the `window` tokens before it (`FULL`: all of them).

    q (B, T, H, D); k, v (B, S, K, D) with H a multiple of K; the last query is aligned with the last key.
    Returns (B, T, H, D). Decoding (T < S) is SDPA's, and so is "flex" outside of `torch.compile`. Raises RuntimeError
    for "flex" inside it without the mask of `prepare_block_masks`.
    """
    B, T, S = q.size(0), q.size(1), k.size(1)
    if window >= S - 1:
        window = FULL
    if backend == "fa3" and T == S:
        y = flash_attention_3(q, k, v, causal=True, window_size=(window, 0 if window != FULL else -1))
        return y[0] if isinstance(y, tuple) else y  # older releases return the log-sum-exp too
    if backend == "varlen" and T == S:
        from torch.nn.attention.varlen import varlen_attn

        starts = torch.arange(0, (B + 1) * T, T, device=q.device, dtype=torch.int32)  # (B + 1,)
        gqa = {"enable_gqa": True} if q.size(2) != k.size(2) else {}
        rows = (t.flatten(0, 1) for t in (q, k, v))  # (B T, heads, D)
        return varlen_attn(*rows, starts, starts, T, T, window_size=(window, 0), **gqa).view_as(q)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    grouped = q.size(1) != k.size(1)
    if window == FULL and T == S:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    elif backend == "flex" and torch.compiler.is_compiling() and T == S:
        from torch.nn.attention.flex_attention import flex_attention

        if (T, window, q.device) not in _block_masks:
            raise RuntimeError(f"no block mask for {T} tokens and a window of {window}: call prepare_block_masks first")
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
