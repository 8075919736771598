"""Normalisation by constant statistics and an activation, channel by channel, and what both keep for the backward pass."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lbpwht_jax.ops.coders import Companded, Mask, Slopes
from lbpwht_jax.ops.dtypes import accumulation_dtype
from lbpwht_jax.ops.gelu import gelu, gelu_slope
from lbpwht_jax.ops.platforms import apart, by_platform
from lbpwht_jax.ops.sharding import explicit_sharding, vary_alike

Activation = Literal["gelu", "relu"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """``activation((x - mean) * inverse * scale + bias)`` of the last axis, computed in at least float32.

    Attributes:
      mean: ``[channels]``, as all four arrays of one dtype of at least 32 bits.
      inverse: one over the standard deviation, ``[channels]``; a constant.
      scale: ``[channels]``.
      bias: ``[channels]``.
      bits: in how many bits the normalised x is kept, 4 or 8; ``None`` keeps x itself.
      activation: ``"gelu"``, ``"relu"`` or ``None``.
      dtype: the result's.
    """

    mean: Any
    inverse: Any
    scale: Any
    bias: Any
    bits: int | None = dataclasses.field(metadata={"static": True})
    activation: Activation = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def running(
        cls,
        statistics: tuple[jax.Array, jax.Array],
        scale: jax.Array,
        bias: jax.Array,
        epsilon: float,
        bits: int | None,
        dtype: Any,
        activation: Activation = None,
    ) -> "Affine":
        """Batch normalisation (Ioffe and Szegedy, 2015) by a mean and a variance that are constants.

        Args:
          statistics: mean and variance, ``[channels]``.
          scale, bias: ``[channels]``.
          epsilon: added to the variance.
          bits, dtype, activation: the attributes.
        """
        own = accumulation_dtype(jnp.dtype(dtype))
        mean, variance, scale, bias = (a.astype(own) for a in (*lax.stop_gradient(statistics), scale, bias))
        return cls(mean, lax.rsqrt(variance + epsilon), scale, bias, bits, activation, jnp.dtype(dtype))

    def after(self, bias: jax.Array) -> "Affine":
        """The same of ``x + bias``."""
        return dataclasses.replace(self, mean=self.mean - bias.astype(self.mean.dtype))

    def scaled(self, factor: jax.Array) -> "Affine":
        """The same, the result before the activation multiplied by ``factor``, ``[channels]``."""
        factor = factor.astype(self.scale.dtype)
        return dataclasses.replace(self, scale=self.scale * factor, bias=self.bias * factor)

    @property
    def factor(self) -> jax.Array:
        """What x is multiplied by, ``[channels]``."""
        return self.inverse * self.scale

    def cotangents(self, scale: jax.Array, sums: jax.Array) -> "Affine":
        """Those of mean, scale and bias, in their places.

        Args:
          scale: the scale's.
          sums: of the cotangent of what the activation takes, over all axes but the last, ``[channels]``.
        """
        scale, sums = (a.astype(self.inverse.dtype) for a in (scale, sums))
        return dataclasses.replace(self, mean=-self.factor * sums, inverse=jnp.zeros_like(sums), scale=scale, bias=sums)

    def of_scale(self, products: jax.Array, sums: jax.Array) -> jax.Array:
        """The scale's cotangent from sums over all axes but the last, ``[channels]``.

        Args:
          products: of x times the cotangent of what the activation takes: with them CPUs read x itself, and make no array of
            what is normalised.
          sums: of that cotangent alone.
        """
        products, sums = (a.astype(self.inverse.dtype) for a in (products, sums))
        return (products - self.mean * sums) * self.inverse

    def normalised(self, x: jax.Array) -> jax.Array:
        """``(x - mean) * inverse``, in at least float32."""
        x = x.astype(accumulation_dtype(x.dtype))
        return (x - _along(self.mean, x)) * _along(self.inverse, x)

    def of_normalised(self, normalised: jax.Array) -> jax.Array:
        """What the activation takes, from what is normalised."""
        return normalised * _along(self.scale, normalised) + _along(self.bias, normalised)

    def before_activation(self, x: jax.Array) -> jax.Array:
        """In Flax's order, so that rounding is the same."""
        x = x.astype(accumulation_dtype(x.dtype))
        return (x - _along(self.mean, x)) * _along(self.factor, x) + _along(self.bias, x)

    def activated(self, z: jax.Array) -> jax.Array:
        """The activation of ``z``, in the result's dtype."""
        if self.activation == "gelu":
            z = gelu(z)
        if self.activation == "relu":
            z = jnp.maximum(z, 0)
        return z.astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """What the backward pass gets of x.

    Attributes:
      x: x itself, or the normalised x in few bits; ``None`` where nothing is differentiated but x, without an activation.
      positive: where the ReLU's slope is one, beside few bits: rounding would turn slopes near zero over.
    """

    x: Any
    positive: Any


def forward(x: jax.Array, affine: Affine, wants_parameters: bool) -> tuple[jax.Array, Kept]:
    """The result, and what is kept of x.

    Args:
      x: ``[..., channels]``.
      affine: what is applied.
      wants_parameters: whether its mean, scale or bias is differentiated.
    """
    y = affine.activated(affine.before_activation(x))
    if not (wants_parameters or affine.activation):
        return y, Kept(None, None)
    if affine.bits is None:
        return y, Kept(x, None)
    normalised = affine.normalised(x)
    positive = Mask.of(affine.before_activation(x) > 0) if affine.activation == "relu" else None
    kept, y = apart((Kept(Companded.of(normalised, affine.bits), positive), y))
    return y, kept


def through_activation(g: jax.Array, kept: Kept, affine: Affine) -> jax.Array:
    """The cotangent of what the activation takes, in at least float32, from the result's, ``g``."""
    dtype, g = g.dtype, g.astype(accumulation_dtype(g.dtype))
    if affine.activation is None:
        return g
    if isinstance(kept.x, Companded):
        z = affine.of_normalised(kept.x.decoded())
    else:
        z = affine.before_activation(lax.optimization_barrier(kept.x))
    if affine.activation == "gelu":
        return _made_once(g * gelu_slope(z), dtype)
    return jnp.where(z > 0 if kept.positive is None else kept.positive.decoded(), g, 0)


def _made_once(x: jax.Array, dtype: Any) -> jax.Array:
    """x, on accelerators rounded to a narrow dtype: several passes read it, and XLA, finding it dear, stores it for them."""
    if x.dtype == dtype or explicit_sharding(x) is not None:
        return x
    rounded: Callable[[jax.Array], jax.Array] = lambda x: lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)  # noqa: E731
    return by_platform(lambda x: x, x, cuda=rounded, tpu=rounded)


def activated_and_slope(z: jax.Array, affine: Affine) -> tuple[jax.Array, Any]:
    """The activation of z, and what is kept of its slope, as ``through_slope`` takes it: z itself with ``bits=None``."""
    y = affine.activated(z)
    if affine.activation is None or affine.bits is None:
        return y, None if affine.activation is None else z
    slope = Slopes.of(gelu_slope(z), affine.bits) if affine.activation == "gelu" else Mask.of(z > 0)
    return apart((y, slope))


def through_slope(g: jax.Array, kept: Any, affine: Affine) -> jax.Array:
    """As ``through_activation``, from what ``activated_and_slope`` kept."""
    if affine.activation is None:
        return g
    if affine.activation == "gelu":
        return g * (kept.decoded() if isinstance(kept, Slopes) else gelu_slope(lax.optimization_barrier(kept)))
    return jnp.where(kept.decoded() if isinstance(kept, Mask) else kept > 0, g, 0)


@jax.named_scope("norm")
def parameter_cotangents(g: jax.Array, sums: jax.Array, kept: Kept, affine: Affine) -> Affine | None:
    """Those of mean, scale and bias, in their places; ``None`` where nothing was kept of x.

    Args:
      g: what ``through_activation`` returned.
      sums: those of g over all axes but the last, ``[channels]``.
      kept: what ``forward`` kept.
      affine: what was applied.
    """
    rows = tuple(range(g.ndim - 1))
    if kept.x is None:
        return None
    if isinstance(kept.x, Companded):
        return affine.cotangents(jnp.sum(g * kept.x.decoded(), rows), sums)
    return affine.cotangents(affine.of_scale(jnp.sum(g * kept.x.astype(g.dtype), rows), sums), sums)


def along_channels(x: jax.Array, affine: Affine) -> jax.Array:
    """``x``, ``[..., channels]``, times the factor, in its dtype."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return (wide * _along(affine.factor, wide)).astype(x.dtype)


def check_affine(affine: Affine | None, channels: int, name: str, argument: str = "affine") -> None:
    """Checks an affine map of so many channels.

    Args:
      affine: the map, or ``None``.
      channels: those of what it is applied to.
      name: where it is used; it opens the messages.
      argument: as what it was given.

    Raises:
      TypeError: if it is no ``Affine``.
      ValueError: if its arrays are not ``[channels]`` of one wide floating-point dtype, or its bits or activation are unknown.
    """
    if affine is None:
        return
    if not isinstance(affine, Affine):
        raise TypeError(f"{name}: {argument} must be a lbpwht_jax.ops.Affine, such as Affine.running(...), got {affine!r}")
    arrays = {field: jnp.asarray(getattr(affine, field)) for field in ("mean", "inverse", "scale", "bias")}
    dtype = accumulation_dtype(arrays["mean"].dtype)
    for field, array in arrays.items():
        if array.shape != (channels,) or array.dtype != dtype:
            raise ValueError(
                f"{name}: {argument}.{field} must be [{channels}], one number per channel, in {jnp.dtype(dtype)}; "
                f"got {list(array.shape)} of {array.dtype}. Affine.running(...) brings all four arrays to one dtype"
            )
    if affine.activation not in ("gelu", "relu", None):
        raise ValueError(f"{name}: {argument}.activation must be 'gelu', 'relu' or None, got {affine.activation!r}")
    if affine.bits not in (None, 4, 8):
        raise ValueError(f"{name}: {argument}.bits must be 4, 8 or None, got {affine.bits!r}")


def check_before(before: Affine | None, activation: str | None, channels: int, name: str) -> None:
    """As ``check_affine``, for what is applied to an input of so many channels; also raises if there is an activation too."""
    check_affine(before, channels, name, "before")
    if before is not None and activation is not None:
        raise ValueError(f"{name}: before and activation={activation!r} are both given; let before end in the activation")


def split(affine: Affine) -> tuple[bool, Affine]:
    """Whether mean, scale or bias is differentiated, and the values, of what JAX gives a forward pass."""
    perturbed = [leaf.perturbed for leaf in (affine.mean, affine.scale, affine.bias)]
    return any(perturbed), jax.tree.map(lambda leaf: leaf.value, affine)


def vary_with(maps: Sequence[Affine | None], *arrays: Any) -> tuple[list[Any], list[Any]]:
    """The arrays and the affine maps' after ``vary_alike``, ``None`` where there is none; ``inverse`` is not differentiated."""
    leaves, tree = jax.tree.flatten((list(arrays), list(maps)))
    others, varying = jax.tree.unflatten(tree, vary_alike(*leaves))
    constant = [None if a is None else dataclasses.replace(a, inverse=lax.stop_gradient(a.inverse)) for a in varying]
    return others, constant


def apply(x: jax.Array, affine: Affine) -> jax.Array:
    """``affine`` of ``x``, ``[..., channels]``, keeping one array for the backward pass."""
    (x,), (affine,) = vary_with([affine], x)
    return _apply(x, affine)


@jax.custom_vjp
def _apply(x: jax.Array, affine: Affine) -> jax.Array:
    return affine.activated(affine.before_activation(x))


def _forward(x: Any, affine: Affine) -> tuple[jax.Array, tuple]:
    wants_parameters, affine = split(affine)
    y, kept = forward(x.value, affine, wants_parameters)
    return y, (kept, affine, jnp.zeros((), x.value.dtype))


def _backward(residuals: tuple, g: Any) -> tuple:
    if isinstance(g, SymbolicZero):
        return None, None
    if residuals[1].bits is not None:
        residuals, g = apart((residuals, g))
    kept, affine, like = residuals
    through = through_activation(g, kept, affine)
    cotangents = parameter_cotangents(through, jnp.sum(through, tuple(range(g.ndim - 1))), kept, affine)
    return along_channels(through, affine).astype(like.dtype), cotangents


_apply.defvjp(_forward, _backward, symbolic_zeros=True)


def _along(channels: jax.Array, x: jax.Array) -> jax.Array:
    """``[channels]`` as x broadcasts it."""
    return channels.reshape((1,) * (x.ndim - 1) + (-1,)).astype(x.dtype)
