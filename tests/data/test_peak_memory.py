"""What small files that ask for much memory take: less than one and a half times what ordinary reading takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFUSED = {
    "strip.png": "read",
    "large.png": "12000 x 12000 pixels are more than the 134,217,728 that an image may have",
    "large.zip": "3,072 MiB, more than the 320 MiB that an image file may have",
    "liar.zip": "Bad CRC-32",
    "large.pth": "refused, it would unpack to 3,072 MiB, more than 16 times its size",
    "liar.pth": "Bad CRC-32",
    "memo.pth": "3 bytes before entry 268435455 of its memo",
    "stride.pth": "far larger than the file",
}


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory in other units")
def test_peak_memory(tmp_path):
    # one process for all: its peak only rises, so each file is measured against ordinary reading
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "bombs.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    ordinary, said = found.pop("ordinary")
    assert said == "read" and found.keys() == REFUSED.keys()
    for name, (peak, said) in found.items():
        assert REFUSED[name] in said, (name, said)
        assert peak < 1.5 * ordinary, (name, peak, ordinary)
