"""Parsing one command's arguments and running it."""

import atexit
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import tyro

from lbpwht_jax.cli.commands import Command
from lbpwht_jax.cli.help import description, explain
from lbpwht_jax.screen import console, say


class Runnable(Protocol):
    """A command with its arguments: a dataclass that tyro fills."""

    def prepare(self) -> Callable[[], int | None] | None:
        """Checks all that can be checked at once.

        Returns:
          What does the work and returns the exit code, None for 0; or None if nothing is left to do.

        Raises:
          TypeError, ValueError, FileNotFoundError, ImportError: if an argument is mistaken.
        """
        ...


def load(command: Command) -> type[Runnable]:
    """The command's dataclass, its help made ready; imports its module."""
    loaded = getattr(importlib.import_module(f"lbpwht_jax.cli.{command.module}"), command.name)
    explain(loaded)
    return loaded


def execute(name: str, command: Command, arguments: Sequence[str]) -> int:
    """Runs a command; arguments, result and what is raised are those of ``main``."""
    loaded = load(command)
    parsed = tyro.cli(loaded, prog=f"lbpwht {name}", description=description(loaded), args=arguments)
    # where a checkpoint cannot be read or written, the error is reported once; what others log of it is not worth a trace
    for library in ("asyncio", "absl"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    logging.getLogger("huggingface_hub").propagate = False  # it shows its warnings itself
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _of_python_s_threads
    try:
        run = parsed.prepare()
    except (TypeError, ValueError, FileNotFoundError, ImportError) as error:
        report(error)
        return 2
    except OSError as error:
        report(error)
        return 1
    try:
        return 0 if run is None else run() or 0
    except (FloatingPointError, OSError, ValueError) as error:
        report(error)
        if isinstance(error, OSError):
            atexit.register(_end_quietly)
        return 1


def _of_python_s_threads(unraisable: "sys.UnraisableHookArgs") -> None:
    """Shows no trace from a thread of tensorstore's: once one file could not be written, nobody waits for the others."""
    if unraisable.object is not None or threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


def _end_quietly() -> None:
    """Keeps other writers, such as a checkpoint's threads, from saying again at the end that a file cannot be written."""
    sys.unraisablehook = threading.excepthook = lambda arguments: None


def report(error: Exception) -> None:
    """Shows an error on the standard error stream."""
    say(console("stderr"), f"lbpwht: {error}", style="red")
