import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource
import numpy as np
from lbpwht_jax.train import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**31 + 2**20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
first, *again = faults(), faults(), faults()
assert first > 100 and max(again) < 10, (first, again)
"""


@pytest.mark.heavy
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told")
def test_freed_memory_is_used_again_without_page_faults():
    # also results of over 2 GiB, which whole steps of large models have
    subprocess.run([sys.executable, "-c", PAGE_FAULTS], check=True, timeout=300)
