"""Stops training at a signal: one process, or all of them at the same step."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

STOPPED, FAILED = 3, 1
MARK = ".stop"
_LOOK_EVERY = 0.2


def nothing_saved() -> bool:
    """Says that there is no checkpoint."""
    return False


class StopSignals:
    """A context manager that notes SIGTERM and SIGINT; calling it tells whether to stop.

    The first signal is only noted; a second one ends all processes of the run at once, with exit code 3 if a checkpoint is
    there, else 1, and a line on the standard error stream.

    With several processes, a SIGTERM to any of them stops all of them at the same step, by JAX's own handler; SIGINT is
    passed on as SIGTERM. The process that gets a second signal tells the others by a file. Must be entered in the main thread.

    Args:
      run: the run's folder, where several processes have one.
      saved: tells whether a checkpoint is there.

    Attributes:
      received: the signal received; ``None`` so far.
    """

    def __init__(self, run: Path | None = None, saved: Callable[[], bool] = nothing_saved):
        self.received: signal.Signals | None = None
        self._mark = None if run is None or jax.process_count() == 1 else run / MARK
        self._saved = saved
        self._before = {}
        self._wakeup, self._pipe = -1, (-1, -1)

    def __enter__(self) -> "StopSignals":
        several = jax.process_count() > 1
        handlers = {signal.SIGINT: self._pass_on} if several else {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # which ends the thread
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step; every process must ask after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM
            self._before.setdefault(signal.SIGTERM, signal.signal(signal.SIGTERM, self._leave))
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, self._leave)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._leave)
        os.kill(os.getpid(), signal.SIGTERM)

    def _leave(self, number: int, frame: FrameType | None) -> NoReturn:
        if self._mark is not None:
            self._mark.touch()
        self._end(f"by a second signal, {signal.Signals(number).name}")

    def _watch(self, pipe: int) -> None:
        """Sees a second signal while the main thread is busy outside Python, as in a compilation, and the other processes'."""
        count, wait = 0, None if self._mark is None else _LOOK_EVERY
        while True:
            if select.select([pipe], [], [], wait)[0]:
                received = os.read(pipe, 64)
                if not received:
                    os.close(pipe)
                    return
                count += sum(number in (signal.SIGINT, signal.SIGTERM) for number in received)
                if count > 1:
                    self._leave(received[-1], None)
            if self._mark is not None and self._mark.exists():
                self._end("by a second signal to another process")

    def _end(self, how: str) -> NoReturn:
        saved = self._saved()
        what = "the last checkpoint is as it was" if saved else "no checkpoint was saved"
        leave(f"stopped at once {how}; {what}", STOPPED if saved else FAILED)


def leave(text: str, code: int) -> NoReturn:
    """Ends the process at once, whatever its threads do, with a line on the standard error stream."""
    with contextlib.suppress(OSError):  # nobody may be reading
        os.write(2, f"lbpwht: {text}\n".encode())
    os._exit(code)
