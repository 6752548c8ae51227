"""What a controller may observe, by name, and how a policy reads it.

| observation  | meaning, at the moment of the decision                                          |
|--------------|---------------------------------------------------------------------------------|
| `progress`   | t / T in [0, 1): steps taken over steps planned (the paper's only one)          |
| `step`       | t, steps taken                                                                  |
| `train_loss` | training loss of the last step taken; NaN before the first                      |
| `probe_loss` | mean loss over the fixed probe batches; costs the loop a forward pass over them |
| `grad_norm`  | global L2 norm of the last step's gradient; NaN before the first                |

A feature is a number that a policy reads, made of one observation. `WATCHED` are besides the statistics without units
that an observer measures (jel/unitless.py, jel/observer.py), those of the training loss and the optimizer; a loop does
not give them one by one: it attaches the controller, or the task's observer, to the optimizer.
Shapes: S features, `...` nothing or E episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jel.errors import JelError
from jel.unitless import feature_names

OBSERVATIONS = frozenset({"progress", "step", "train_loss", "probe_loss", "grad_norm"})
TINY = 1e-8


def _log(value: Tensor) -> Tensor:
    """Logarithm of what is above 0; 0 where nothing was observed yet."""
    return torch.where(value > 0, value.clamp_min(TINY).log(), 0.0)


# name -> (the observation it is made of, the function)
FEATURES = {
    "progress": ("progress", lambda x: x),
    "log_probe_loss": ("probe_loss", _log),
    "log_train_loss": ("train_loss", _log),
    "log_grad_norm": ("grad_norm", _log),
}

# measured by an observer, each of itself; nothing that needs a validation loss
WATCHED = tuple(
    name for name in feature_names(()) if name != "progress" and "val" not in name and "loss_ratio" not in name
)


def observations_of(features: Sequence[str]) -> frozenset[str]:
    """The observations that these features are made of. Raises `JelError` for an unknown feature."""
    known = {name: source for name, (source, _) in FEATURES.items()} | dict(zip(WATCHED, WATCHED))
    if unknown := [name for name in features if not isinstance(name, str) or name not in known]:
        listed = f"{', '.join(FEATURES)}, and what an observer measures (jel.features.WATCHED)"
        raise JelError(f"unknown features {', '.join(map(repr, unknown))}; there are {listed}")
    return frozenset(known[name] for name in features)


def feature_vector(features: Sequence[str], observation: Mapping[str, float | Tensor]) -> Tensor:
    """Observations, floats or tensors (E,) -> features (S,) or (E, S), float32. NaN reads as 0."""
    columns = []
    for name in features:
        source, function = FEATURES.get(name, (name, lambda x: x))
        columns.append(function(torch.as_tensor(observation[source], dtype=torch.float32)))
    return torch.stack(torch.broadcast_tensors(*columns), dim=-1).nan_to_num(0.0)


def one_number(name: str, value: Any) -> float | Tensor:
    """What a loop told: a number, or a tensor () that stays on its device, in float32 at least, since sums follow.

    Raises `JelError` for what is no single number.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.detach().reshape(()).to(torch.promote_types(value.dtype, torch.float32))
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        what = f"a tensor of {value.numel()} elements" if isinstance(value, Tensor) else repr(value)
        raise JelError(f"observe() was told {name} {what}; it takes one number") from None
