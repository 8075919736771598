"""Where kernels take over the Walsh transforms, and how JAX maps, shards and exports them.

Their kinds, on ``[..., tokens or coefficients, channels]``:

- ``project``: tokens to coefficients, ``A x``.
- ``expand``: coefficients to tokens, ``E c``.
- ``gelu_backward``: coefficients c and tokens h to ``gelu'(h) * E c`` and ``A gelu(h)``, reading h once for both.

JAX gives no guarantee that a later XLA understands a GPU's kernels: to export a program that has some with ``jax.export``, pass
``disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]``.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from lbpwht_jax.ops import kernels_gpu, products_tpu
from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.sharding import explicit_sharding
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

# TPUs have products instead: their compiler does not split kernels over several chips.
_BACKENDS: dict[str, Any] = {"cuda": kernels_gpu}

# The second axis of operands and of results: n tokens, r coefficients.
_AXES = {
    "project": ("n", "r"),
    "expand": ("r", "n"),
    "gelu_backward": ("rn", "nr"),
}


def kernel_forms(kind: str, x: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int) -> dict[str, Callable[..., Any]]:
    """What takes the transforms' place for operands like x, by platform: kernels (``"cuda"``) or products (``"tpu"``).

    Args:
      kind: which one.
      x: ``[..., tokens or coefficients, channels]``.
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.

    Returns:
      Functions of arrays ``[..., tokens or coefficients, channels]`` that return one, or two for ``gelu_backward``.
    """
    if explicit_sharding(x) is not None:
        return {}
    takers = [name for name, backend in _BACKENDS.items() if backend.takes(x.dtype, spec, grid, prefix_tokens)]

    def form(platform: str, *arrays: jax.Array) -> Any:
        batch = arrays[0].shape[:-2]
        flat = [array.reshape(math.prod(batch), *array.shape[-2:]) for array in arrays]
        results = kernel(platform, kind, spec, grid, prefix_tokens)(*flat)
        results = tuple(array.reshape(*batch, *array.shape[1:]) for array in results)
        return results[0] if len(results) == 1 else results

    forms: dict[str, Callable[..., Any]] = {platform: functools.partial(form, platform) for platform in takers}
    if products_tpu.takes(x.dtype, spec, grid, prefix_tokens):
        forms["tpu"] = products_tpu.form(kind, spec, grid, prefix_tokens)
    return forms


@functools.cache
def kernel(
    platform: str, kind: str, spec: SpecFields, grid: Grid, prefix_tokens: int = 0, interpret: bool = False
) -> Callable[..., tuple[jax.Array, ...]]:
    """A kernel as a function that can be mapped (``vmap``), and sharded along batch and channels.

    Args:
      platform: ``"cuda"``.
      kind: which one.
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.
      interpret: runs it on any platform, slowly, as a test does.

    Returns:
      A function of arrays ``[batch, tokens or coefficients, channels]`` that returns a tuple of such arrays.
    """
    backend, (inputs, outputs) = _BACKENDS[platform], _AXES[kind]
    rows = {"n": prefix_tokens + math.prod(grid), "r": prefix_tokens + coefficient_count(spec, grid)}
    letters = iter("defghijklm")
    shapes_of_tables = jax.eval_shape(lambda: backend.tables(spec, grid, prefix_tokens, jnp.float32))
    tables = [" ".join(itertools.islice(letters, table.ndim)) for table in shapes_of_tables]

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        like = operands[-1]
        varying = jax.typeof(like).manual_axis_type
        shapes = [
            jax.ShapeDtypeStruct((len(like), rows[n], like.shape[-1]), like.dtype, manual_axis_type=varying) for n in outputs
        ]
        return backend.run(kind, shapes, *operands, interpret=interpret)

    def partition(mesh: Any, operands: Any, results: Any) -> tuple:
        batch, _, channels = (*operands[-1].sharding.spec, None, None, None)[:3]
        split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((batch, None, channels), ()))
        return mesh, run, (split,) * len(outputs), (whole,) * len(tables) + (split,) * len(inputs)

    partitioned = custom_partitioning(run)
    rule = f"{', '.join([*tables, *(f'b {n} c' for n in inputs)])} -> {', '.join(f'b {n} c' for n in outputs)}"
    replicated = [*" ".join(tables).split(), *dict.fromkeys(inputs + outputs)]
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(replicated))

    @custom_vmap
    def mapped(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        operands = (*backend.tables(spec, grid, prefix_tokens, arrays[0].dtype), *arrays)
        # inside shard_map each device has its own part already
        return run(*operands) if jax.typeof(arrays[0]).manual_axis_type.varying else partitioned(*operands)

    @mapped.def_vmap
    def _(size: int, batched: list[bool], *arrays: jax.Array) -> tuple:
        whole = [a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in zip(arrays, batched, strict=True)]
        results = mapped(*(a.reshape(size * a.shape[1], *a.shape[2:]) for a in whole))
        return tuple(r.reshape(size, -1, *r.shape[1:]) for r in results), (True,) * len(results)

    return mapped
