"""The base schedule as pure functions of the step: what the hyperparameters are before any controller acts."""

from __future__ import annotations


def lr_factor(
    step: int, num_iterations: int, warmup_ratio: float, warmdown_ratio: float, final_lr_frac: float
) -> float:
    """Warm up linearly, hold at 1, then fall linearly over the last `warmdown_ratio` of the run to `final_lr_frac`."""
    warmup, warmdown = round(warmup_ratio * num_iterations), round(warmdown_ratio * num_iterations)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown:
        return 1.0
    left = (num_iterations - step) / warmdown
    return left + (1 - left) * final_lr_frac


def wd_factor(step: int, num_iterations: int, final_wd_frac: float) -> float:
    """Weight decay falls linearly to `final_wd_frac` at the end of the run."""
    return 1 - (1 - final_wd_frac) * step / num_iterations


def muon_momentum(step: int, num_iterations: int) -> float:
    """0.85 -> 0.95 over the first 300 steps, or as large a share of a shorter run as that is of the paper's 561."""
    left = max(0.0, 1 - step / min(300.0, 300 / 561 * num_iterations))
    return left * 0.85 + (1 - left) * 0.95


def base_hparams(
    param_groups: list[dict],
    step: int,
    num_iterations: int,
    warmup_ratio: float,
    warmdown_ratio: float,
    final_lr_frac: float,
    final_wd_frac: float,
) -> list[dict]:
    """`{"lr", "weight_decay", "momentum", "beta2"}` per param group at this step, from its `initial_lr` and the like.

    The momentum of a group of kind "muon" has a schedule of its own; AdamW's is its beta1, and stays as it is. Nothing
    is written: that is the hook's part.
    """
    lr = lr_factor(step, num_iterations, warmup_ratio, warmdown_ratio, final_lr_frac)
    wd = wd_factor(step, num_iterations, final_wd_frac)
    momentum = muon_momentum(step, num_iterations)
    bases = []
    for g in param_groups:
        base = {"lr": g["initial_lr"] * lr, "weight_decay": g["initial_wd"] * wd}
        if g.get("kind") == "muon":
            base["momentum"] = momentum
        elif "initial_momentum" in g:
            base["momentum"] = g["initial_momentum"]
        if "initial_beta2" in g:
            base["beta2"] = g["initial_beta2"]
        bases.append(base)
    return bases
