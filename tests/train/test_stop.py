import os
import signal
import subprocess
import sys

import chex
import pytest

from lbpwht_jax.train.stop import StopSignals


def test_the_first_signal_is_noted():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(2) and stop(3) and stop.received is signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("saved", "code", "text"), [(True, 3, "last checkpoint is as it was"), (False, 1, "no checkpoint")])
def test_a_second_signal_ends_the_process_at_once(saved, code, text):
    # the second one comes while the main thread is outside Python, as it is while XLA compiles
    program = (
        "import hashlib, os, signal, threading\nfrom lbpwht_jax.train.stop import StopSignals\n"
        f"with StopSignals(saved=lambda: {saved}):\n os.kill(os.getpid(), signal.SIGINT)\n"
        " threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        " hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 9)\n print('still here')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    chex.assert_equal((ended.returncode, ended.stdout), (code, ""))
    assert ended.stderr.startswith("lbpwht: stopped at once by a second signal") and text in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
