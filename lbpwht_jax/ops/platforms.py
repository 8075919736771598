"""What differs between the platforms a program may be lowered for: decided when it is lowered, not when it is traced.

A program traced or exported on a CPU host thus gets a GPU's forms when it is lowered for a GPU.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from lbpwht_jax.ops.sharding import explicit_sharding, vary_alike


def by_platform(plain: Callable[..., Any], *operands: Any, **forms: Callable[..., Any]) -> Any:
    """``forms[platform](*operands)`` on the platforms named (``"cuda"``, ``"tpu"``), ``plain(*operands)`` on all others."""
    return lax.platform_dependent(*operands, default=plain, **forms)


def apart(arrays: Any) -> Any:
    """The same tree of arrays, all computed, on accelerators, before anything that uses the ones returned.

    Their compilers would otherwise put off what only the backward pass uses until then, and keep what it is made of as well;
    and they would take what is computed again there for what they have. XLA's CPU backend drops such barriers before it
    schedules, so CPUs get none.
    """
    leaves, tree = jax.tree.flatten(arrays)
    if any(explicit_sharding(leaf) is not None for leaf in leaves):
        return lax.optimization_barrier(arrays)
    barrier: Callable[..., Any] = lambda *leaves: lax.optimization_barrier(leaves)  # noqa: E731
    return jax.tree.unflatten(tree, by_platform(lambda *leaves: leaves, *leaves, cuda=barrier, tpu=barrier))


def by_itself(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """``function(x)``, which XLA's CPU backend makes where it stands, in one pass.

    It would otherwise merge it with whatever reads it, in the backward pass, several times over where there are several
    readers, and keep what it is made of until then. It leaves the branches of a condition apart that it cannot decide.
    """
    if explicit_sharding(x) is not None or not x.size:
        return function(x)

    def branch(x: jax.Array) -> Any:
        first = x[(0,) * x.ndim]
        return lax.cond((first == first) | (first != first), function, nothing, x)  # true, of NaN too

    def nothing(x: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(jax.eval_shape(function, x))
        zeros = [vary_alike(jnp.zeros(leaf.shape, leaf.dtype), x)[0] for leaf in leaves]
        return jax.tree.unflatten(tree, zeros)

    return by_platform(function, x, cpu=branch)


def row_major(x: jax.Array) -> jax.Array:
    """x, laid out row by row; GPUs and TPUs would otherwise lay it out as suits what it is made of, or what it goes to."""
    layout = Layout(tuple(range(x.ndim)))
    laid_out: Callable[[jax.Array], jax.Array] = lambda x: with_layout_constraint(x, layout)  # noqa: E731
    return by_platform(lambda x: x, x, cuda=laid_out, tpu=laid_out)


def is_narrow(*dtypes: Any) -> bool:
    """Whether all dtypes are the same floating-point type of 16 bits."""
    return len(set(dtypes)) == 1 and jnp.dtype(dtypes[0]) in (jnp.bfloat16, jnp.float16)
