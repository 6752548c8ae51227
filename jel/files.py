"""Reading and writing whole files: never half written, and every failure one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jel.errors import JelError


def json_bytes(value: Any) -> bytes:
    """The contents of a JSON file meant to be read by people too."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_files(contents: dict[Path, bytes]) -> None:
    """Write files so that a reader sees each one old or new, never half; raises `JelError` if that fails.

    All are on disk under temporary names before the first is renamed, so files that belong together change together
    but for a kill between two renames, which a hash of one in the other brings to light.
    """
    temporary = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except OSError as e:
        raise JelError(f"cannot write {path} ({e.strerror or e})") from None


def read_bytes(path: Path, what: str) -> bytes:
    """The bytes of a file; raises `JelError`, which calls it `what`, if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise JelError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise JelError(f"{what} {path} cannot be read ({e})") from None


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file; raises `JelError`, which calls it `what`, if it is missing or malformed."""
    try:
        return json.loads(read_bytes(path, what))
    except (ValueError, RecursionError) as e:
        raise JelError(f"{what} {path} is not JSON ({e})") from None
