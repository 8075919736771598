"""Interleaved timing, and the limits of the machine at hand."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Longer on accelerators, where the next calls are launched while one runs.
_SAMPLE_SECONDS, _LONG_SAMPLE_SECONDS = 0.004, 0.1
_PEAK_SIZE, _COPY_BYTES = 4096, 1 << 26


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function. They are timed in turn, so that a slow spell of the machine affects all of them.

    Args:
      functions: take no arguments and return arrays; they are called twice before the clock starts, so that they are compiled.
      rounds: number of samples of each; a sample of a fast function is the mean of several calls in a row.
    """
    repeats, wanted = {}, _SAMPLE_SECONDS if jax.default_backend() == "cpu" else _LONG_SAMPLE_SECONDS
    for name, function in functions.items():
        jax.block_until_ready(function())
        started = time.perf_counter()
        jax.block_until_ready(function())
        repeats[name] = max(1, int(wanted / (time.perf_counter() - started)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            output = None  # the results before are freed first
            started = time.perf_counter()
            for _ in range(repeats[name]):
                output = function()
            jax.block_until_ready(output)
            samples[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_flops(dtype: Any, rounds: int = 9) -> float:
    """FLOP/s of one large matrix product of this dtype on the default device, at 2 FLOPs per multiply-add."""
    size = _PEAK_SIZE if jax.default_backend() != "cpu" else _PEAK_SIZE // 2
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / interleaved({"": lambda: product(a, b)}, rounds)[""]


def bandwidth(rounds: int = 9) -> float:
    """Bytes/s of a pass that reads and writes an array of 64 MiB in place (256 MiB on accelerators); both directions count."""
    size = _COPY_BYTES * (1 if jax.default_backend() == "cpu" else 4)
    array = [jnp.zeros(size // 4, jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def step() -> jax.Array:
        array[0] = add(array[0])
        return array[0]

    return 2 * size / interleaved({"": step}, rounds)[""]


def machine() -> dict[str, Any]:
    """What timings depend on: processor, cores, device and versions."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        models = [line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "lbpwht_jax")},
    }
