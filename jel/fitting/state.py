"""A fit that can be stopped and gone on with: signals, and one file that holds all of its state."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from jel.errors import JelError
from jel.files import read_bytes, write_files

FORMAT, VERSION = "jel-fit-state", 1
FILE = "fit.safetensors"


class StopRequest:
    """Whether Ctrl-C or SIGTERM has come. The second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Outside of the main thread signals cannot be heard, and nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def save_state(folder: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """`facts`: JSON values. `state`: nested dicts of tensors and numbers. One file, replaced as a whole."""
    tensors, numbers = _flat(state)
    metadata = {"format": FORMAT, "version": str(VERSION), "facts": json.dumps({**facts, "numbers": numbers})}
    write_files({folder / FILE: safetensors.torch.save(tensors, metadata)})


def load_state(folder: Path) -> tuple[dict, dict] | None:
    """(facts, state) as they were saved, or None if the folder holds none. Executes nothing; raises `JelError`."""
    path = folder / FILE
    if not path.exists():
        return None
    data = read_bytes(path, "fit state")
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        if (metadata["format"], metadata["version"]) != (FORMAT, str(VERSION)):
            raise ValueError("another format")
        facts = json.loads(metadata["facts"])
        return facts, _nested({**tensors, **facts.pop("numbers")})
    except Exception as e:  # whatever a parser of foreign bytes may raise
        raise JelError(f"{path} is not a {FORMAT} of version {VERSION} ({' '.join(str(e).split())})") from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            below = _flat(value, f"{prefix}{key}/")
            tensors |= below[0]
            numbers |= below[1]
        elif isinstance(value, Tensor):
            tensors[prefix + key] = value.contiguous()
        else:
            numbers[prefix + key] = value
    return tensors, numbers


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split("/")
        at = tree
        for key in above:
            at = at.setdefault(key, {})
        at[last] = value
    return tree
