"""A signal before training begins, from the first second."""

import signal
import subprocess
import sys

import pytest

# what the command line imports first is held up, so that the signal comes in the middle of an import
SLOW = (
    "import sys, time\n"
    "class Slow:\n"
    "  def find_spec(self, name, path=None, target=None):\n"
    "    if name == 'tyro': print('importing', flush=True); time.sleep(60)\n"
    "sys.meta_path.insert(0, Slow())\n"
    "from lbpwht_jax.cli import main\n"
    "from lbpwht_jax.cli import entry\n"
    "entry.NEEDED = ()\n"
    "sys.exit(main(['finetune', '--output', sys.argv[1]]))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packages_are_imported(number, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 3
    assert error == f"lbpwht: stopped by {number.name} before training began, nothing to save\n"
    assert not (tmp_path / "run").exists()
