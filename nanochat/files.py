"""Reading JSON, writing files atomically and locking folders: the one module of nanochat and scripts that does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nanochat.common import UserError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which replaces `path` when the body ends: a reader sees the old contents or the new.

    Folders that are missing are made. The bytes are on disk before the file gets its name. If the body raises, `path`
    stays as it was and the temporary file `.<name>.tmp` beside it is removed; after a kill the next write replaces it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, atomically. Raises TypeError or ValueError for what JSON cannot express."""
    data = json.dumps(value, indent=2) + "\n"
    with atomic_file(path) as f:
        f.write(data.encode())


def read_json(path: Path, what: str = "file"):
    """Read JSON; raises `UserError` in one line, which calls the file `what`, if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} cannot be read as JSON ({e})") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into the body, by a lock file in `folder` (made if missing).

    The operating system releases the lock of a process that dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
