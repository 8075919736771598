"""Stopping at a signal, in one process or in all of them at the same step."""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """A context manager that turns SIGTERM and SIGINT into a wish to stop, and calls back whether there is one.

    The first of them is only noted; a second one then ends the process at once, as it would have without this.

    With several processes a SIGTERM to any of them stops all at the same step, which JAX's own handler for it arranges; SIGINT
    is passed on as SIGTERM. Must be entered in the main thread.

    Attributes:
      received: the signal that came, if one did.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        several = jax.process_count() > 1
        handlers = {signal.SIGINT: self._pass_on} if several else {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step, which must be asked after every step, by every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
