import os
import signal
import subprocess
import sys

import chex

from lbpwht_jax.train.stop import StopSignals


def test_the_first_signal_is_noted_and_the_next_is_not_caught():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(2) and stop(3) and stop.received is signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal\nfrom lbpwht_jax.train.stop import StopSignals\nwith StopSignals():\n"
        " for _ in range(2):\n  os.kill(os.getpid(), signal.SIGTERM)\n print('still here')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    chex.assert_equal((ended.returncode, ended.stdout), (-signal.SIGTERM, ""))
