"""What is shown: tables that cut nothing, on streams that a run can lose without ending (a closed pipe, a full disk)."""

import contextlib
import os
import sys
from typing import Any, Literal

from rich.console import Console
from rich.table import Column, Table

_UNLIMITED = 10_000
_SHORT = 12


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
    """A console on a standard stream whose loss does no harm; in a pipe or file, lines are as long as what they say.

    Args:
      stream: which one.
      quiet: whether nothing is shown at all.
    """
    file: Any = Lasting(stream)  # as much of a file as rich uses
    return Console(file=file, quiet=quiet, width=None if file.isatty() else _UNLIMITED)


def say(shown: Console, text: str, style: str | None = None) -> None:
    """Prints a text as it is; on a terminal it is folded between words, elsewhere it stays one line."""
    shown.print(text, style=style, markup=False, highlight=False, soft_wrap=not shown.is_terminal)


def show(shown: Console, table: Table) -> None:
    """Prints a table without cutting a name or a number.

    Where the terminal is too narrow, headings and names are folded; if that is not enough, columns that say the same in every
    row become a line below the table, and if that is not enough either, each row becomes a block of lines.
    """
    below = ""
    if sum(map(_natural, table.columns)) > _room(shown, table):
        least = sum(map(_least, table.columns))
        same = [column for column in table.columns[1:] if table.row_count > 1 and len({*map(str, column.cells)}) == 1]
        if least > _room(shown, table) and same:
            table.columns = [column for column in table.columns if column not in same]
            below = "; ".join(f"{column.header}: {next(iter(column.cells))}" for column in same if any(column.cells))
        if table.title:
            say(shown, str(table.title))
            table.title = None
        spare = _room(shown, table) - sum(map(_least, table.columns))
        if spare < 0:
            _blocks(shown, table, below)
            return
        for column in sorted(table.columns, key=lambda column: column.justify == "right"):  # names before numbers
            column.overflow, column.width = "fold", min(_natural(column), _least(column) + spare)
            spare -= column.width - _least(column)
    shown.print(table)
    if below:
        say(shown, below)


def _room(shown: Console, table: Table) -> int:
    """Characters for the cells themselves: a border and a space on both sides of each take the others."""
    return shown.width - 3 * len(table.columns) - 1


def _texts(column: Column) -> list[str]:
    return [str(text) for text in (column.header, *column.cells)]


def _natural(column: Column) -> int:
    return max(len(line) for text in _texts(column) for line in text.split("\n") or [""])


def _least(column: Column) -> int:
    """The longest word; names, which stand on the left, may be folded to a few characters."""
    longest = max((len(word) for text in _texts(column) for word in text.split()), default=0)
    return longest if column.justify == "right" else min(longest, _SHORT)


def _blocks(shown: Console, table: Table, below: str) -> None:
    first, *others = table.columns
    for number, name in enumerate(first.cells):
        say(shown, str(name))
        for column in others:
            value = list(column.cells)[number]
            if value:
                say(shown, f"  {column.header}: {value}")
    if below:
        say(shown, below)
