"""What JAX must be told about shardings: on meshes with explicit axes, and inside ``shard_map``."""

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def is_explicit(array: jax.Array) -> bool:
    """Whether the array is on a mesh with explicit axes."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """The array's sharding on a mesh with explicit axes, where a product must be told its own; ``None`` on other meshes."""
    return jax.typeof(array).sharding if is_explicit(array) else None


def with_whole_tokens(sharding: NamedSharding) -> NamedSharding:
    """The sharding of ``[..., tokens, channels]`` with the token axis on every device."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-2], None, sharding.spec[-1]))


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Casts arrays inside ``shard_map`` to vary over the same mesh axes, so that a replicated kernel's cotangent is summed."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return [lax.pcast(array, names, to="varying") if names else array for array, names in zip(arrays, missing, strict=True)]
