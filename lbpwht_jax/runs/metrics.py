"""What a run measured, step by step: ``metrics.jsonl`` and TensorBoard's files."""

import json
import os
from pathlib import Path

from tensorboardX import SummaryWriter

from lbpwht_jax.train import Epoch, Step

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsFile:
    """Appends a JSON line for each step and epoch to the folder's ``metrics.jsonl``, and shows it to TensorBoard.

    A context manager.

    Args:
      run: the run folder.
      batch_size: images per step.
      done: how many steps were done before; lines of later steps are dropped.
      write: false in those processes of a run that leave the writing to the first one.
    """

    def __init__(self, run: Path, batch_size: int, done: int = 0, write: bool = True):
        if write:
            steps, epochs = read_metrics(run)
            kept = sorted((event for event in (*steps, *epochs) if _step(event) <= done), key=_step)
            new = run / f"{METRICS}.new"
            new.write_text("".join(map(_line, kept)))
            os.replace(new, run / METRICS)
        self._write, self._batch_size = write, batch_size
        self._file = (run / METRICS if write else Path(os.devnull)).open("a", buffering=1)
        self._board = SummaryWriter(str(run / TENSORBOARD), purge_step=done + 1, write_to_disk=write)

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, event: Step | Epoch) -> None:
        """Adds one event: ``{"kind": "step" or "epoch", ...its fields}``; losses are means, times in seconds."""
        self._file.write(_line(event))
        if isinstance(event, Step):
            values = {name: getattr(event, name) for name in ("loss", "accuracy", "gradient_norm")}
            values["images_per_second"] = self._batch_size / event.seconds
        else:
            values = {name: getattr(event, name) for name in ("test_loss", "test_accuracy")}
        for name, value in values.items():
            self._board.add_scalar(name, value, _step(event))

    def sync(self) -> None:
        """Waits until all that was written is on the disk."""
        if self._write:
            os.fsync(self._file.fileno())


def read_metrics(run: Path) -> tuple[list[Step], list[Epoch]]:
    """Reads the folder's ``metrics.jsonl``, up to a line that was not written to its end."""
    steps, epochs = [], []
    file = run / METRICS
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        if values.pop("kind") == "step":
            steps.append(Step(**values))
        else:
            epochs.append(Epoch(**values))
    return steps, epochs


def _line(event: Step | Epoch) -> str:
    return json.dumps({"kind": type(event).__name__.lower(), **event._asdict()}) + "\n"


def _step(event: Step | Epoch) -> int:
    return event.number if isinstance(event, Step) else event.step
