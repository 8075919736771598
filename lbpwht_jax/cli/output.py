"""Standard output and the standard error stream, which a run can lose without ending: a closed pipe, a full disk."""

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
        # Python flushes the stream again when it ends, which would fail again
        lost, null = getattr(sys, self._name), open(os.devnull, "w")  # noqa: SIM115 - it stays open
        setattr(sys, self._name, null)
        try:
            os.dup2(null.fileno(), lost.fileno())
        except (OSError, ValueError, AttributeError):
            return


def console(stream: Literal["stdout", "stderr"] = "stdout", quiet: bool = False) -> Console:
    """A console on a standard stream whose loss does no harm.

    Args:
      stream: which one.
      quiet: whether nothing is shown at all.
    """
    return Console(file=Lasting(stream), quiet=quiet)  # pyright: ignore[reportArgumentType] - as much of a file as rich uses
