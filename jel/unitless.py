"""What LHOPT's policy sees: statistics without units, measured inside any training loop. Pure functions.

A *measurement* is made at one training step out of `MEASURE_EVERY`, counted from the first step of each window; a
*window* is the steps between two decisions. Four vectors are measured, each over all parameters together:

| vector | meaning                                                                                                   |
|--------|-----------------------------------------------------------------------------------------------------------|
| g      | the gradient that the optimizer is given, after any clipping                                              |
| m      | the exponential average of the gradients *before* g (Adam's, bias-corrected; SGD's momentum buffer; else  |
|        | the observer's own, decay 0.9, bias-corrected): all zero at the first step, and only its direction and    |
|        | its size next to g count, so a buffer that sums instead of averaging is scaled by 1 - decay               |
| p      | the parameters before the step                                                                            |
| d      | p before the step minus p after it: the whole step, learning rate and weight decay included               |

Their sums (`SUMS`) are all that leaves the loop, so a measurement is a few reductions and no wait for the device.
At a decision the window's measurements are averaged, joined with the losses, and turned into features against the
run's own past (`observe`). The first decision comes before the first step: nothing is measured yet.

Shapes: `...` any leading axes (none in a live loop, E episodes side by side in training), S statistics, I inner ones,
W end weights, A knobs, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MEASURE_EVERY = 4  # steps (the paper's inner_feature_frequency)
END_WEIGHTS = (1.25, 2.5, 5.0, 10.0, 20.0)  # the paper's
TINY = 1e-8  # the paper's; added to every norm and loss whose logarithm is taken
LEAST_DEVIATION = 1e-4  # a statistic that moves less than this in its past counts as standing still
LOGIT_CLIP = 1e-8  # a cosine's probability is kept this far from 0 and 1: its logit lies within +-18.4
LARGEST_LOG = 20.0  # logarithms are clipped to +-this

# one measurement is these sums over all elements of all parameters; `n` is the number of elements
SUMS = ("gg", "mm", "pp", "dd", "gm", "gp", "gd", "abs_d", "n", "clipped", "above_epsilon")

# name -> what it is; the order of `inner_statistics`' last axis
INNER = {
    "log_update_ratio": "log |d| - log |p|",
    "log_momentum_ratio": "log |m| - log |g|: the two regimes of signal and noise",
    "log_noise_scale": "log |m| - log |m - g|",
    "cos_grad_momentum": "cosine of g and m",
    "cos_grad_param": "cosine of g and p",
    "cos_grad_update": "cosine of g and d",
    "logit_grad_momentum": "logit of Phi(cos sqrt n): 0 for a random direction",
    "logit_grad_update": "the same of g and d",
    "phi_grad_param": "Phi(cos sqrt n) of g and p",
    "log_update_spread": "log mean |d_i| - log rms d_i: 0 if all move alike, far below it if few move",
    "clipped": "share of the measured steps whose gradient was clipped (0 where nothing clips)",
    "above_epsilon": "share of elements whose denominator is above epsilon (1 where there is none)",
}
OUTER = {
    "log_train_loss": "log of the mean training loss of the window",
    "log_val_loss": "log of the validation loss at the decision",
    "log_loss_ratio": "log_train_loss - log_val_loss",
    "log_outer_update": "log |p now - p at the previous decision| - log |p now|",
    "log_straightness": "log |p now - p at the previous decision| - log of the length of the path between them",
    "log_norm_ratio": "log |p now| - log |p at the first decision|",
}
STATISTICS = (*INNER, *OUTER)
# read beside the statistics, with no history of their own; logarithms of losses pass through tanh
CHANGES = ("train_drop", "val_drop", "train_fall", "val_fall", "val_above_best")
FLAGS = ("train_unknown", "val_unknown")  # 1 where the loss is missing or not finite
NOT_READ = ("log_train_loss", "log_val_loss")  # in units of the task: only their CDFs reach the policy


# -----------------------------------------------------------------------------
# one measurement


def standard_normal_cdf(z: Tensor) -> Tensor:
    """Phi(z), elementwise."""
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def cosine(product: Tensor, square_a: Tensor, square_b: Tensor) -> Tensor:
    """The cosine of two vectors from their inner product and squared norms: 0 where either is zero."""
    scale = (square_a.clamp_min(0).sqrt() * square_b.clamp_min(0).sqrt()).double()
    cos = torch.where(scale > 0, product.double() / scale.clamp_min(1e-300), 0.0)
    return cos.clamp(-1, 1).to(product.dtype)


def cosine_cdf(cos: Tensor, n: Tensor) -> Tensor:
    """Phi(cos sqrt(n)): between random directions in n dimensions cos sqrt(n) is nearly standard normal."""
    return standard_normal_cdf(cos * n.sqrt())


def logit(p: Tensor) -> Tensor:
    p = p.double().clamp(LOGIT_CLIP, 1 - LOGIT_CLIP)
    return (p.log() - (-p).log1p()).float()


def log_norm(square: Tensor) -> Tensor:
    """log(|x| + TINY) from |x|^2."""
    return (square.clamp_min(0).sqrt() + TINY).log()


def inner_statistics(sums: Mapping[str, Tensor]) -> Tensor:
    """One measurement's sums (`SUMS`), each (...), -> the statistics `INNER` (..., I), float32.

    What is not finite comes out as 0: a run that has blown up is told by its losses.
    """
    gg, mm, pp, dd = (sums[name] for name in ("gg", "mm", "pp", "dd"))
    n = torch.as_tensor(sums["n"], dtype=torch.float32, device=gg.device)
    begun = mm > 0  # before the second step there is no momentum
    gm = cosine(sums["gm"], gg, mm)
    gp = cosine(sums["gp"], gg, pp)
    gd = cosine(sums["gd"], gg, dd)
    rest = log_norm(mm + gg - 2 * sums["gm"])  # |m - g|
    columns = [
        log_norm(dd) - log_norm(pp),
        torch.where(begun, log_norm(mm) - log_norm(gg), 0.0),
        torch.where(begun, log_norm(mm) - rest, 0.0),
        gm,
        gp,
        gd,
        logit(cosine_cdf(gm, n)),
        logit(cosine_cdf(gd, n)),
        cosine_cdf(gp, n),
        (sums["abs_d"] / n + 1e-20).log() - ((dd / n).sqrt() + 1e-20).log(),
        torch.as_tensor(sums["clipped"], device=gg.device),
        torch.as_tensor(sums["above_epsilon"], device=gg.device) / n,
    ]
    stacked = torch.stack(torch.broadcast_tensors(*(c.float() for c in columns)), dim=-1)
    return stacked.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST_LOG, LARGEST_LOG)


# -----------------------------------------------------------------------------
# a statistic against its own past


def historical_cdf(
    x: Tensor, mean: Tensor, var: Tensor, count: Tensor, end_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where x stands in its own past, itself included: (..., S) -> CDFs (..., S, W), new mean and variance (..., S, W).

    The past is weighted by density k u^(k - 1) over normalised history u in [0, 1], whose weight at the end is the
    end weight k; online, with t observations so far, a = k / (t + k - 1), mean += a (x - mean),
    var = (1 - a)(var + a (x - old mean)^2). `count` (..., S) is t, this x included. Half at the first x.
    (Our reading: the paper gives the end weights, not the formula.)
    """
    a = end_weights / (count[..., None] + end_weights - 1)  # (..., S, W)
    gap = x[..., None] - mean
    mean = mean + a * gap
    var = (1 - a) * (var + a * gap * gap)
    z = (x[..., None] - mean) / var.sqrt().clamp_min(LEAST_DEVIATION)
    return standard_normal_cdf(z), mean, var


# -----------------------------------------------------------------------------
# a decision


def new_memory(shape: Sequence[int] = (), end_weights: Sequence[float] = END_WEIGHTS) -> dict[str, Tensor]:
    """What `observe` carries from decision to decision, before the first: tensors with leading axes `shape`."""
    s, w = len(STATISTICS), len(end_weights)
    unknown = torch.full(tuple(shape), float("nan"))
    names = ("first_train", "first_val", "last_train", "last_val", "best_val", "first_norm")
    return {
        "mean": torch.zeros(*shape, s, w),
        "var": torch.zeros(*shape, s, w),
        "count": torch.zeros(*shape, s),
        **{name: unknown.clone() for name in names},
    }


def feature_names(knobs: Sequence[str], end_weights: Sequence[float] = END_WEIGHTS) -> tuple[str, ...]:
    """Names of the features in `observe`'s order; F of them."""
    return (
        "progress",
        *(name for name in STATISTICS if name not in NOT_READ),
        *CHANGES,
        *FLAGS,
        *(f"{knob}_relative" for knob in knobs),
        *(f"{knob}_last_move" for knob in knobs),
        *(f"{name}_cdf_{k:g}" for name in STATISTICS for k in end_weights),
    )


def observe(
    memory: Mapping[str, Tensor],
    *,
    progress: Tensor,
    inner: Tensor | None,
    train_loss: Tensor,
    val_loss: Tensor,
    param_norm: Tensor,
    outer_update: Tensor,
    path: Tensor,
    relative: Tensor,
    last_move: Tensor,
    end_weights: Sequence[float] = END_WEIGHTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (..., F) float32 at a decision, and the memory for the next one.

    progress      (...) steps taken over steps planned, in [0, 1)
    inner         (..., I) mean of `inner_statistics` over the window's measurements; None at the first decision
    train_loss    (...) mean over the window's steps; NaN at the first decision
    val_loss      (...) the newest one known at the decision; NaN where the loop gives none
    param_norm    (...) |p| now
    outer_update  (...) |p now - p at the previous decision|; anything at the first decision
    path          (...) sum over the window's steps of |d|: the measured ones' sum x steps / measured steps
    relative      (..., A) log(value / value at the start) of each knob (difference of logits for a logit knob)
    last_move     (..., A) log of the last action's factor (or shift of the logit); 0 at the first decision

    Losses must be above 0. A loss that is not finite counts as unknown: its flag is 1, its features 0, its history
    stays. The same for an outer statistic before there is a window.
    """
    shape = param_norm.shape
    nothing = torch.full(shape, float("nan"))
    known = lambda x: torch.where(x.isfinite(), (x.clamp_min(0) + TINY).log(), torch.nan)
    train, val = known(train_loss.float()), known(val_loss.float())
    norm = param_norm.float()
    log_norm_now = (norm + TINY).log()
    if inner is None:
        inner, moved, straight = torch.full((*shape, len(INNER)), float("nan")), nothing, nothing
    else:
        log_moved = (outer_update.float() + TINY).log()
        moved, straight = log_moved - log_norm_now, log_moved - (path.float() + TINY).log()
    first = lambda name, now: torch.where(memory[name].isnan(), now, memory[name])
    new = {
        "first_train": first("first_train", train),
        "first_val": first("first_val", val),
        "first_norm": first("first_norm", log_norm_now),
        "best_val": torch.fmin(memory["best_val"], val),
        "last_train": torch.where(train.isnan(), memory["last_train"], train),
        "last_val": torch.where(val.isnan(), memory["last_val"], val),
    }
    outer = torch.stack([train, val, train - val, moved, straight, log_norm_now - new["first_norm"]], dim=-1)
    x = torch.cat([inner, outer], dim=-1).clamp(-LARGEST_LOG, LARGEST_LOG)  # (..., S)

    seen = x.isfinite()
    count = memory["count"] + seen
    weights = torch.tensor(tuple(end_weights), dtype=torch.float32)
    cdf, mean, var = historical_cdf(
        torch.where(seen, x, 0.0), memory["mean"], memory["var"], count.clamp_min(1), weights
    )
    new["count"] = count
    new["mean"] = torch.where(seen[..., None], mean, memory["mean"])
    new["var"] = torch.where(seen[..., None], var, memory["var"])

    changes = torch.stack(
        [
            memory["last_train"] - train,
            memory["last_val"] - val,
            new["first_train"] - train,
            new["first_val"] - val,
            val - new["best_val"],
        ],
        dim=-1,
    )
    read = torch.tensor([name not in NOT_READ for name in STATISTICS])
    features = torch.cat(
        [
            progress.float().expand(shape)[..., None],
            torch.where(seen, x, 0.0)[..., read],
            torch.tanh(changes).nan_to_num(0.0),
            torch.stack([train.isnan(), val.isnan()], dim=-1).float(),
            relative.float(),
            last_move.float(),
            torch.where(seen[..., None], cdf, 0.5).flatten(-2),
        ],
        dim=-1,
    )
    return features, new
