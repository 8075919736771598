"""Two processes of two devices each, on the loopback address."""

import os
import signal
import socket
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from lbpwht_jax.cli import main
from lbpwht_jax.runs.metrics import read_metrics
from lbpwht_jax.train.checkpoint import FROZEN, last_step
from lbpwht_jax.train.processes import connect
from lbpwht_jax.weights.files import load_weights

OPTIONS = [
    "--method",
    "lora-2",
    "--lora-dropout",
    "0.2",
    "--train",
    "head",
    "--batch-size",
    "72",
    "--epochs",
    "1",
    "--lr",
    "1e-3",
]


def start(process, port, run):
    code = "import sys; from lbpwht_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    joined = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(process)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "finetune", *OPTIONS, *joined, "--shard", "params", "--output", str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.heavy  # four processes, each of which loads and compiles everything, on as many cores as the suite has for two
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(i, port, tmp_path / "run") for i in range(2)]
    # meanwhile alone, on this process's devices
    assert main(["finetune", *OPTIONS, "--output", str(tmp_path / "alone")]) == 0
    deadline = time.monotonic() + 300
    while len(read_metrics(tmp_path / "run")[0]) < 2 and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], printed
    assert "on digits" in printed[0] and "on digits" not in printed[1]
    done = last_step(tmp_path / "run")
    assert done is not None and 2 <= done < 19 and f"stopped by SIGTERM after step {done} of 19" in printed[0]
    assert (tmp_path / "run" / FROZEN).exists()
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    (steps, epochs), (wanted, wanted_epochs) = (read_metrics(tmp_path / name) for name in ("run", "alone"))
    assert [step.number for step in steps] == list(range(1, 20))
    # sums of other parts in another order, in float32
    np.testing.assert_allclose([step.loss for step in steps], [step.loss for step in wanted], rtol=0, atol=1e-5)
    assert [epoch.test_accuracy for epoch in epochs] == [epoch.test_accuracy for epoch in wanted_epochs]
    weights = [load_weights(tmp_path / name / "weights.safetensors")[0] for name in ("run", "alone")]
    chex.assert_trees_all_close(*weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "go together; give all three or none"),
        (("host", 2, 0), "--coordinator must be HOST:PORT, got 'host'"),
        (("host:1", 2, 2), "--process-id must be from 0 to 1, got 2"),
    ],
)
def test_processes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        connect(*arguments)
