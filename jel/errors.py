"""The one error type that jel raises on purpose."""

from __future__ import annotations


class JelError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""
