"""Settings of every test run: eight CPU devices, strict dtype and rank promotion, warnings as errors."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def eight_devices():
    """Fails every test if a plugin used the backend before the devices were set."""
    if jax.device_count() < 8:
        raise RuntimeError(f"the tests need 8 CPU devices, found {jax.device_count()}")
