"""What a training run shows while it runs."""

import resource
import sys
import time
from collections.abc import Sequence
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lbpwht_jax.screen import say
from lbpwht_jax.train import Epoch, Step, Trainer

_LINE_EVERY = 30.0
_SMOOTHING = 0.9


class Reporter:
    """Shows a training's progress: a bar on a terminal, elsewhere lines; a line for every epoch. A context manager.

    Args:
      console: where it is printed.
      trainer: the trainer whose progress is shown.
      done: how many steps were done before.
      losses: those of the steps of the epoch that is going on.
    """

    def __init__(self, console: Console, trainer: Trainer, done: int, losses: Sequence[float] = ()):
        self._console, self._total = console, trainer.steps
        self._epochs, self._per_epoch = trainer.recipe.epochs, trainer.steps_per_epoch
        self._batch_size = trainer.recipe.batch_size
        self._pace: float | None = None
        self._losses, self._first = [*losses], True
        self._line_at = time.monotonic() + _LINE_EVERY
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=self._total, completed=done, epoch=self._epoch(done + 1), text="")

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def show(self, event: Step | Epoch) -> None:
        """Shows what happened: a step or the end of an epoch."""
        if isinstance(event, Epoch):
            trained = f"training loss {sum(self._losses) / len(self._losses):.3f}, " if self._losses else ""
            self._losses = []
            on = "test" if event.validation_accuracy is None else "validation"
            measured = f"{on} loss {event.loss:.3f}, {on} accuracy {event.accuracy:.2%}"
            self._print(f"epoch {event.number}/{self._epochs}: {trained}{measured}, {self._rate()}")
            return
        if not self._first:  # the first step is slower than the others
            self._pace = event.seconds if self._pace is None else _SMOOTHING * self._pace + (1 - _SMOOTHING) * event.seconds
        self._first = False
        self._losses.append(event.loss)
        epoch, measured = self._epoch(event.number), f"loss {event.loss:.3f}, accuracy {event.accuracy:.1%}"
        text = f"{measured}, {self._rate()}"
        self._bar.update(self._task, completed=event.number, epoch=epoch, text=text)
        if not self._console.is_terminal and time.monotonic() > self._line_at:
            self._line_at = time.monotonic() + _LINE_EVERY
            self._print(f"epoch {epoch}, step {event.number}/{self._total}: {text}, {self._remaining(event.number)}")

    def _epoch(self, step: int) -> str:
        return f"{min(1 + (step - 1) // self._per_epoch, self._epochs)}/{self._epochs}"

    def _rate(self) -> str:
        rate = "" if self._pace is None else f"{self._batch_size / self._pace:.0f} images/s, "
        return f"{rate}{memory_in_use()}"

    def _remaining(self, step: int) -> str:
        seconds = round((self._total - step) * (self._pace or 0.0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} to go"

    def _print(self, line: str) -> None:
        say(self._console, line)


def memory_in_use() -> str:
    """Says how much memory the first device has in use or, where the backend does not tell, the most this process ever had."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_in_use" in statistics:
        return f"{statistics['bytes_in_use'] / 2**20:,.0f} MiB on the device"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB"
