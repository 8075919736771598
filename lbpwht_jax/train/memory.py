"""How the C library gives out memory."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the kernel.

    Otherwise arrays of more than 32 MB get fresh pages at every step, which the kernel clears first: a third of the low-rank
    backward pass of a large layer on a CPU. To be called before JAX's first computation. The process then never shrinks.

    Returns:
      Whether glibc keeps it; false where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1))
    return all(libc.mallopt(*setting) for setting in settings)
