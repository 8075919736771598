"""A pseudo-terminal of any width around what a test runs, and what it shows in the end."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest


class Recording:
    """What was shown.

    Attributes:
      raw: everything that was written, with the terminal's control sequences; complete once the terminal is closed.
    """

    raw = ""

    @property
    def lines(self):
        """The lines as they stand in the end: a line that is written over counts as it was last."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw).replace("\r\n", "\n")
        return [line.split("\r")[-1] for line in text.split("\n")]


@contextlib.contextmanager
def terminal(columns):
    """Standard input, output and errors are a terminal of this width until the context ends."""
    recording, (ours, theirs) = Recording(), pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    parts = []

    def read():
        with contextlib.suppress(OSError):  # how Linux tells the end
            while part := os.read(ours, 1 << 16):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    before = [os.dup(number) for number in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(theirs, number)
            patch.setattr(sys, name, open(os.dup(theirs), "r" if number == 0 else "w"))  # noqa: SIM115 - closed below
        streams = (sys.stdin, sys.stdout, sys.stderr)
        try:
            yield recording
        finally:
            for stream in streams:
                stream.close()
            for number, old in enumerate(before):
                os.dup2(old, number)
                os.close(old)
            os.close(theirs)
            reader.join()
            os.close(ours)
            recording.raw = b"".join(parts).decode()
