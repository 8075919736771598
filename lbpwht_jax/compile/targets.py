"""The machines a step can be compiled for, none of which need be there."""

import contextlib
import dataclasses
import importlib.util
import math
import re
from typing import Any, Literal

import jax
from jax.experimental import topologies

from lbpwht_jax.compile.chips import CHIPS, Chip

Platform = Literal["tpu", "cuda", "cpu"]

# What libtpu calls a chip's topologies, the axes these have, and the chips of one host.
_TPUS = {"v4": ("v4", 3, 4), "v5e": ("v5e", 2, 8), "v5p": ("v5", 3, 4), "v6e": ("v6e", 2, 8)}
# A v4's two cores make one device, as they do for JAX on the machine itself.
_ONE_DEVICE = {"v4": {"chip_config_name": "megacore"}}
# XLA's flags for a GPU that is not there: its products cannot be timed, so cuBLAS takes them, untimed.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
# A GPU as XLA's GpuTargetConfigProto describes it (openxla/xla, xla/backends/gpu/target_config/specs). An H200 is an H100 with
# another memory.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": _HOPPER.format(bandwidth=3352320000000, memory=84929347584, name="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4800000000000, memory=150754820096, name="NVIDIA H200"),
}
_HELP = (
    "write v5e:2x2, v6e:1x1, v4:2x2x1, v5p:2x2x1 (a TPU and its chips, on several hosts too, such as v5e:16x16), h100 "
    "or h200 (a GPU), or cpu:1 (this machine's compiler and so many devices)"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine.

    Attributes:
      name: as it was asked for.
      platform: whose compiler is asked.
      chip: its name in ``CHIPS``; empty for a CPU.
      shape: chips along each axis of the topology.
    """

    name: str
    platform: Platform
    chip: str
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def limits(self) -> Chip | None:
        """What a chip can do at most; ``None`` for a CPU."""
        return CHIPS.get(self.chip)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """What the compiler is told."""
        return dict(_GPU_OPTIONS) if self.platform == "cuda" else {}

    def check_installed(self) -> None:
        """Whether the target's compiler is installed.

        Raises:
          ImportError: if it is not.
        """
        package = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}.get(self.platform)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"target {self.name!r} needs the package {package}, which is not installed: "
                "pip install 'lbpwht_jax[compile]' (on Linux)"
            )

    def described(self) -> contextlib.AbstractContextManager[Any]:
        """Tells JAX which GPU its kernels are for, while it traces, lowers and compiles: JAX 0.11 asks the one at hand."""
        if self.platform != "cuda":
            return contextlib.nullcontext()
        description = jax.sharding.AbstractDevice(self.open()[0].device_kind, None, "gpu")
        return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=description))

    def open(self) -> list[Any]:
        """The target's devices, which can be compiled for and nothing else.

        Raises:
          ValueError: if the compiler knows no such topology.
        """
        if self.platform == "cpu":
            return jax.devices("cpu")[: self.devices]
        try:
            if self.platform == "cuda":
                shape = "x".join(map(str, (1, 1, self.devices)))
                found = topologies.get_topology_desc(platform="cuda", target_config=_GPUS[self.chip], topology=shape)
            else:
                name, axes, per_host = _TPUS[self.chip]
                options = _host_bounds(self.shape, axes, per_host) | _ONE_DEVICE.get(self.chip, {})
                shape = "x".join(map(str, self.shape))
                found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **options)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(f"target {self.name!r}: the compiler knows no such machine: {error}") from None
        return list(found.devices)


def _host_bounds(shape: tuple[int, ...], axes: int, per_host: int) -> dict[str, Any]:
    """libtpu takes a topology smaller than a host for one on a host of that size; larger ones need not be told."""
    if math.prod(shape) >= per_host:
        return {}
    return {"chips_per_host_bounds": shape + (1,) * (3 - axes)}


def parse_target(name: str) -> Target:
    """The machine that a name stands for.

    Raises:
      ValueError: if it is none.
    """
    kind, _, shape = name.partition(":")
    if shape and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(f"unknown target {name!r}; {_HELP}")
    sizes = tuple(int(n) for n in shape.split("x")) if shape else ()
    if kind == "cpu" and len(sizes) <= 1:
        return Target(name, "cpu", "", sizes or (1,))
    if kind in _GPUS and len(sizes) <= 1:
        return Target(name, "cuda", kind, sizes or (1,))
    if kind in _TPUS:
        axes = _TPUS[kind][1]
        if len(sizes) not in (0, axes):
            raise ValueError(f"target {name!r}: the chips of a {kind} stand along {axes} axes, such as {kind}:{_example(axes)}")
        return Target(name, "tpu", kind, sizes or (1,) * axes)
    raise ValueError(f"unknown target {name!r}; {_HELP}")


def _example(axes: int) -> str:
    return "x".join(("2", "2", "1")[:axes])
