"""What a signal does before training begins, from the first second: while packages are imported, too."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STOPPED = 3


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Until the context ends, SIGTERM and SIGINT end the process with a line and exit code 3. For the main thread alone.

    Training takes both signals over while it runs.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    # neither an exception, which an import may swallow, nor a call that waits for threads
    with contextlib.suppress(OSError):  # nobody may be reading
        os.write(2, f"lbpwht: stopped by {signal.Signals(number).name} before training began, nothing to save\n".encode())
    os._exit(STOPPED)
