"""Where kernels take over the Walsh transforms, and how JAX maps, shards and exports them.

Their kinds, on ``[..., tokens or coefficients, channels]``:

- ``project``: tokens to coefficients, ``A x``.
- ``expand``: coefficients to tokens, ``E c``.
- ``gelu_backward``: coefficients c and tokens h to ``gelu'(h) * E c`` and ``A gelu(h)``, reading h once for both.
- ``gelu_backward_projected``: the same, with ``A (gelu'(h) * E c)`` in the first one's place.
- ``gelu_coded``: tokens h to ``gelu(h)``, ``A gelu(h)`` and the codes of ``gelu'(h)`` in 8 bits.
- ``slope_projected``: coefficients c and codes of slopes s to ``A (s * E c)``.
- ``norm_gelu_coded``: a norm and tokens h, normalised n and ``z = n * scale + bias``, to ``gelu(z)``, ``A gelu(z)`` and the
  codes of n in 8 bits.
- ``norm_slope_projected``: a norm, coefficients c and codes of n to ``A (t * scale * inverse)`` with ``t = gelu'(z) * E c``,
  and the sums of t and of t * n over each cell's tokens.

A norm is float32 ``[4, channels]``: mean, inverse of the standard deviation, scale and bias.

JAX gives no guarantee that a later XLA understands a GPU's kernels: to export a program that has some with ``jax.export``, pass
``disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]``. Where no GPU is there, JAX 0.11 and
later must be told which one it is for: export within ``jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=
AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")))``, both of ``jax.sharding``.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lbpwht_jax.ops import kernels_gpu, products_tpu
from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.distributed import distributed
from lbpwht_jax.ops.pallas_gpu import like
from lbpwht_jax.ops.sharding import explicit_sharding
from lbpwht_jax.ops.spec_fields import Grid, SpecFields

# TPUs have products instead: their compiler does not split kernels over several chips.
_BACKENDS: dict[str, Any] = {"cuda": kernels_gpu}

# The second axis of operands and of results: n tokens, r coefficients, u the codes of tokens; or all of it: f a norm, s sums.
_AXES = {
    "project": ("n", "r"),
    "expand": ("r", "n"),
    "gelu_backward": ("rn", "nr"),
    "gelu_backward_projected": ("rn", "rr"),
    "gelu_coded": ("n", "nru"),
    "slope_projected": ("ru", "r"),
    "norm_gelu_coded": ("fn", "nru"),
    "norm_slope_projected": ("fru", "rs"),
}
_SHAPES = {"n": "b n c", "r": "b r c", "u": "b n c", "f": "w c", "s": "b s t c"}


def kernel_forms(kind: str, x: jax.Array, spec: SpecFields, grid: Grid, prefix_tokens: int) -> dict[str, Callable[..., Any]]:
    """What takes the transforms' place for operands like x, by platform: kernels (``"cuda"``) or products (``"tpu"``).

    Args:
      kind: which one.
      x: ``[..., tokens or coefficients, channels]``.
      spec: the functions and the kind of projection.
      grid: tokens along each axis.
      prefix_tokens: leading tokens outside the grid.

    Returns:
      Functions of the kind's operands, ``[..., tokens or coefficients, channels]`` but for a norm, that return one result, or
      several where the kind has several; sums are ``[..., cells, 2, channels]``.
    """
    if explicit_sharding(x) is not None:
        return {}
    takers = [name for name, backend in _BACKENDS.items() if backend.takes(x.dtype, spec, grid, prefix_tokens)]

    def form(platform: str, *arrays: jax.Array) -> Any:
        batch = arrays[-1].shape[:-2]
        flat = [
            array if name == "f" else array.reshape(math.prod(batch), *array.shape[-2:])
            for name, array in zip(_AXES[kind][0], arrays, strict=True)
        ]
        results = kernel(platform, kind, spec, grid, prefix_tokens)(*flat)
        results = tuple(array.reshape(*batch, *array.shape[1:]) for array in results)
        return results[0] if len(results) == 1 else results

    forms: dict[str, Callable[..., Any]] = {platform: functools.partial(form, platform) for platform in takers}
    if kind in products_tpu.KINDS and products_tpu.takes(x.dtype, spec, grid, prefix_tokens):
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
      A function of the kind's operands, ``[batch, tokens or coefficients, channels]`` but for a norm, that returns a tuple of
      such arrays and sums.
    """
    backend, (inputs, outputs) = _BACKENDS[platform], _AXES[kind]
    tokens = prefix_tokens + math.prod(grid)
    rows = {"n": tokens, "u": tokens, "r": prefix_tokens + coefficient_count(spec, grid)}
    first = sum(name == "f" for name in inputs)
    letters = iter("defghijklm")
    shapes_of_tables = jax.eval_shape(lambda: backend.tables(spec, grid, prefix_tokens, jnp.float32))
    table_axes = [" ".join(itertools.islice(letters, table.ndim)) for table in shapes_of_tables]

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x = operands[len(table_axes) + first]

        def shape(name: str) -> jax.ShapeDtypeStruct:
            if name == "s":
                return like(x, (len(x), len(operands[0]), 2, x.shape[-1]), jnp.float32)
            return like(x, (len(x), rows[name], x.shape[-1]), jnp.uint8 if name == "u" else x.dtype)

        return backend.run(kind, [shape(name) for name in outputs], *operands, interpret=interpret)

    def tables(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return backend.tables(spec, grid, prefix_tokens, arrays[first].dtype)

    given, made = ([_SHAPES[name] for name in axes] for axes in (inputs, outputs))
    return distributed(run, given, made, "bc", tables, table_axes)
