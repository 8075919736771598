"""Settings before JAX is imported: the plugins' compilers are asked, but their devices are not there."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
