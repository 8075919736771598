"""Functions of a batch and of weights that all of it shares, under JAX's transformations, which change nothing but rounding.

What is not compiled of itself is jitted: operation by operation, a gradient through ``shard_map`` takes twenty seconds.
"""

import functools

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def gradients(of, operands, g):
    """The result and all cotangents, operation by operation where ``of`` compiles nothing."""
    result, pullback = jax.vjp(of, *operands)
    return [result, *jax.tree.leaves(pullback(g))]


def compiled_gradients(of, operands, g):
    """The same, in one program: some fifty operations take several times as long to compile one by one."""
    return jax.jit(functools.partial(gradients, of))(operands, g)


def _halves(x):
    return x.reshape(2, len(x) // 2, *x.shape[1:])


def _on_each_half(transform, of, x, *weights):
    return transform(of, (0, *(None for _ in weights)))(_halves(x), *weights).reshape(x.shape)


def _vmap(of, in_axes):
    return jax.jit(jax.vmap(of, in_axes))


def _pmap(of, in_axes):
    return jax.pmap(of, in_axes=in_axes, devices=jax.devices()[:2])


def _shard_map(of, x, *weights):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(of, mesh=mesh, in_specs=(P("i"), *(P() for _ in weights)), out_specs=P("i"))
    return jax.jit(mapped)(x, *weights)


def _scan(of, x, *weights):
    return jax.lax.scan(lambda carry, half: (carry, of(half, *weights)), 0, _halves(x))[1].reshape(x.shape)


# Each takes the function, whose result is like the batch, and its operands.
TRANSFORMS = {
    "eager": lambda of, *operands: of(*operands),
    "jit": lambda of, *operands: jax.jit(of)(*operands),
    "vmap": lambda of, *operands: _on_each_half(_vmap, of, *operands),
    "remat": lambda of, *operands: jax.jit(jax.checkpoint(of))(*operands),
    "scan": _scan,
    "pmap": lambda of, *operands: _on_each_half(_pmap, of, *operands),
    "shard_map": _shard_map,
}
