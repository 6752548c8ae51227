"""Reading and writing whole files: a reader sees the old contents or the new, never half of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nanochat.common import UserError


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_json(path: Path, what: str = "file"):
    """Read JSON; raises `UserError` in one line if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} cannot be read as JSON ({e})") from None
