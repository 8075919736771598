"""TensorBoard's file of a run."""

from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] - made on import
from tensorboardX.summary import scalar


class Board:
    """Writes numbers for TensorBoard, in the calling thread.

    tensorboardX's ``SummaryWriter`` leaves the writing to a thread, whose errors on a full disk reach nobody but the terminal.

    Args:
      folder: where the file goes, beside those of earlier parts of the run.
      done: how many steps were done before; TensorBoard hides what earlier files say of later steps.

    Raises:
      OSError: if the file cannot be written.
    """

    def __init__(self, folder: Path, done: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=done + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        """Adds numbers of a step by name; ``seconds`` since 1970 is when it ended.

        Raises:
          OSError: if they cannot be written.
        """
        for name, value in values.items():
            self._writer.write_event(Event(step=step, wall_time=seconds, summary=scalar(name, value)))

    def sync(self) -> None:
        """Waits until all that was added is on the disk.

        Raises:
          OSError: if it cannot be written.
        """
        self._writer.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          OSError: if what was added last cannot be written.
        """
        self._writer.close()
