"""Standard output and the standard error stream, which a run can lose without ending: a closed pipe, a full disk."""

import contextlib
import os
import sys
from typing import Any, Literal

from rich.console import Console


class Lasting:
    """A standard stream that is written to for as long as that works; afterwards all that is written to it is dropped.

    Args:
      name: which stream of ``sys``.
    """

    def __init__(self, name: Literal["stdout", "stderr"]):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(sys, self._name), attribute)

    def write(self, text: str) -> int:
        """Writes text, or drops it."""
        try:
            return getattr(sys, self._name).write(text)
        except (OSError, ValueError, AttributeError):  # ValueError: the stream was closed; AttributeError: there is none
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flushes what was written, or drops it."""
        try:
            getattr(sys, self._name).flush()
        except (OSError, ValueError, AttributeError):
            self._lose()

    def _lose(self) -> None:
        # what is in the stream's buffer is written again when Python ends: to nowhere
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(null, getattr(sys, self._name).fileno())
        os.close(null)


def console(stream: Literal["stdout", "stderr"] = "stdout", quiet: bool = False) -> Console:
    """A console on a standard stream whose loss does no harm.

    Args:
      stream: which one.
      quiet: whether nothing is shown at all.
    """
    return Console(file=Lasting(stream), quiet=quiet)  # pyright: ignore[reportArgumentType] - as much of a file as rich uses
