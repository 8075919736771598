"""Stops training at a signal: one process, or all of them at the same step."""

import os
import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """A context manager that notes SIGTERM and SIGINT; calling it tells whether to stop.

    The first signal is only noted; a second one ends the process at once, as it would without this.

    With several processes, a SIGTERM to any of them stops all of them at the same step, by JAX's own handler; SIGINT is
    passed on as SIGTERM. Must be entered in the main thread.

    Attributes:
      received: the signal received; ``None`` so far.
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
        """Whether to stop after a step; every process must ask after every step."""
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
