"""Errors that a user can cause: one line that names the argument, what was given and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WaltError(ValueError):
    """A mistake in the input, found at the boundary. The CLI prints its message and exits with 1 (2 for usage)."""


class Terminated(WaltError):
    """SIGTERM came, and what was running saved its state and stopped. The CLI exits with 143 = 128 + SIGTERM."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean "x"?)' for the known name closest to `name`, or '' when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""
