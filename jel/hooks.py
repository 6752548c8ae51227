"""Hooks on an optimizer that do not keep alive what they call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weak_hook(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the bound `method` as long as its object lives, and then does nothing."""
    found = weakref.WeakMethod(method)

    def hook(*args: Any) -> Any:
        call = found()
        return None if call is None else call(*args)

    return hook
