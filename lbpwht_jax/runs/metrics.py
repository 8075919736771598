"""What a run measured, step by step: ``metrics.jsonl`` and TensorBoard's files."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from lbpwht_jax.runs.board import Board
from lbpwht_jax.train import Epoch, Step

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_KINDS: Mapping[str, TypeAdapter[Step] | TypeAdapter[Epoch]] = {"step": TypeAdapter(Step), "epoch": TypeAdapter(Epoch)}


class Lines(NamedTuple):
    """What ``metrics.jsonl`` holds: steps, epochs, and what is wrong with each line that cannot be read."""

    steps: list[Step]
    epochs: list[Epoch]
    damage: list[str]


class MetricsFile:
    """Appends a JSON line for each step and epoch to the folder's ``metrics.jsonl``, and shows it to TensorBoard.

    A context manager. Lines that cannot be read are left out; a copy of the file as it was is kept beside it.

    Args:
      run: the run folder.
      batch_size: images per step.
      done: how many steps were done before; lines of later steps are dropped.
      write: false in those processes of a run that leave the writing to the first one.

    Attributes:
      notes: what is wrong with the file as it was, for the user.
    """

    def __init__(self, run: Path, batch_size: int, done: int = 0, write: bool = True):
        self.notes: list[str] = []
        if write:
            steps, epochs, damage = read_lines(run)
            kept = sorted((event for event in (*steps, *epochs) if _step(event) <= done), key=_step)
            if damage:
                copy = keep_copy(run / METRICS)
                self.notes.append(f"{run / METRICS}: {'; '.join(damage)}; left out, the file as it was is kept as {copy.name}")
            lacking = done - len({step.number for step in steps if step.number <= done})
            if lacking:
                there = "lacks" if (run / METRICS).exists() else "is missing and with it"
                self.notes.append(f"{run / METRICS} {there} {lacking} of the {done} steps done; the run goes on without them")
            new = run / f"{METRICS}.new"
            new.write_text("".join(map(_line, kept)))
            os.replace(new, run / METRICS)
        self._batch_size = batch_size
        self._file = (run / METRICS if write else Path(os.devnull)).open("a", buffering=1)
        self._board = Board(run / TENSORBOARD, done) if write else None

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # ``write`` and ``sync`` report what cannot be written
                if file is not None:
                    file.close()

    def write(self, event: Step | Epoch) -> None:
        """Adds one event: ``{"kind": "step" or "epoch", ...its fields}``; losses are means, times in seconds.

        Raises:
          OSError: if it cannot be written.
        """
        self._file.write(_line(event))
        if isinstance(event, Step):
            values = {name: getattr(event, name) for name in ("loss", "accuracy", "gradient_norm")}
            values["images_per_second"] = self._batch_size / event.seconds
        else:
            values = event.measured
        if self._board is not None:
            self._board.add(values, _step(event), time.time())

    def sync(self) -> None:
        """Waits until all that was written is on the disk.

        Raises:
          OSError: if it cannot be written.
        """
        if self._board is not None:
            os.fsync(self._file.fileno())
            self._board.sync()


def read_metrics(run: Path) -> tuple[list[Step], list[Epoch]]:
    """The steps and epochs in the folder's ``metrics.jsonl``, without lines that cannot be read."""
    steps, epochs, _ = read_lines(run)
    return steps, epochs


def read_lines(run: Path) -> Lines:
    """Reads the folder's ``metrics.jsonl``, but for a last line that was not written to its end."""
    lines = Lines([], [], [])
    file = run / METRICS
    *whole, _ = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(whole, 1):
        try:
            values = json.loads(line)
            event = _KINDS[values.pop("kind")].validate_python(values)
            if isinstance(event, Epoch) and not event.measured:
                raise ValueError("an epoch without an accuracy")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            lines.damage.append(f"line {number} is no step or epoch ({line[:40].decode(errors='replace')!r})")
            continue
        if isinstance(event, Step):
            lines.steps.append(event)
        else:
            lines.epochs.append(event)
    return lines


def keep_copy(file: Path) -> Path:
    """Copies a damaged file to a new name beside it, which is returned."""
    names = (file.with_name(f"{file.name}.damaged{number or ''}") for number in range(1 << 30))
    copy = next(name for name in names if not name.exists())
    shutil.copy2(file, copy)
    return copy


def _line(event: Step | Epoch) -> str:
    fields = {name: value for name, value in event._asdict().items() if value is not None}
    return json.dumps({"kind": type(event).__name__.lower(), **fields}) + "\n"


def _step(event: Step | Epoch) -> int:
    return event.number if isinstance(event, Step) else event.step
