"""Code that must not wait for the device is run under `NoWait`, which refuses every read of a tensor's value."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class NoWait(TorchDispatchMode):
    """On a GPU each of `READS` stops the host until the device has caught up."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in READS:
            raise AssertionError(f"{func._schema.name} reads a value: the host would wait for the device")
        return func(*args, **(kwargs or {}))
