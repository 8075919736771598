"""Low-rank stand-ins for ``lax.dot_general`` and ``lax.conv_general_dilated``, which Flax's layers take as arguments."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax

from lbpwht_jax.ops.matmul import low_rank_matmul
from lbpwht_jax.ops.pointwise import pointwise_lacks
from lbpwht_jax.ops.spec_fields import Grid, SpecFields


@dataclasses.dataclass(frozen=True)
class LowRankDotGeneral:
    """``lax.dot_general`` for dense layers, made by ``LowRankSpec.dot_general``; hashable, so that a module can hold it."""

    spec: SpecFields
    grid: Grid | None
    prefix_tokens: int
    name: str

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The product that ``lax.dot_general`` returns, with the backward pass of ``low_rank_matmul``.

        Args:
          lhs: the layer's input, with the contracted dimensions last.
          rhs: the kernel, with the contracted dimensions first.
          dimension_numbers, precision, preferred_element_type, out_sharding: as for ``lax.dot_general``.

        Raises:
          ValueError: unless the last dimensions of ``lhs`` are contracted, in order, with the first of ``rhs``, without
            batch dimensions.
          ValueError, TypeError: whatever ``low_rank_matmul`` raises.
        """
        name = self.name or "low-rank dot_general"
        (left, right), batch = dimension_numbers
        count = len(left)
        expected = tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))
        if any(len(axes) for axes in batch) or (tuple(left), tuple(right)) != expected:
            raise ValueError(
                f"{name}: low-rank backprop takes products over the last dimensions of the input and the first of the kernel, "
                f"as nn.Dense makes; got dimension_numbers={dimension_numbers} for shapes {list(lhs.shape)} and "
                f"{list(rhs.shape)}. Leave this layer dense"
            )
        features = rhs.shape[count:]
        if len(features) != 1 and out_sharding is not None:
            raise ValueError(f"{name}: out_sharding is supported for kernels with one feature dimension, got {list(rhs.shape)}")
        x = lhs.reshape(*lhs.shape[: lhs.ndim - count], math.prod(lhs.shape[lhs.ndim - count :]))
        y = low_rank_matmul(
            x,
            rhs.reshape(x.shape[-1], math.prod(features)),
            self.spec,
            self.grid,
            self.prefix_tokens,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            name=name,
        )
        return y.reshape(*y.shape[:-1], *features)


@dataclasses.dataclass(frozen=True)
class LowRankConv:
    """``lax.conv_general_dilated`` for 1x1 convolutions, made by ``LowRankSpec.conv_general_dilated``; hashable."""

    spec: SpecFields
    name: str

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> jax.Array:
        """The convolution that ``lax.conv_general_dilated`` returns, with the backward pass of ``low_rank_matmul``.

        The arguments are those of ``lax.conv_general_dilated``; ``lhs`` is ``[batch, *grid, in]`` and ``rhs``
        ``[1, ..., 1, in, out]``.

        Raises:
          ValueError: unless window and stride are 1 along every axis, without padding, dilation or groups, and the layout
            is channels-last.
          ValueError, TypeError: whatever ``low_rank_matmul`` raises.
        """
        name = self.name or "low-rank conv_general_dilated"
        spatial = rhs.ndim - 2
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        channels_last = (0, lhs.ndim - 1, *range(1, lhs.ndim - 1))
        kernel_last = (rhs.ndim - 1, rhs.ndim - 2, *range(spatial))
        dilations, groups = (lhs_dilation, rhs_dilation), (feature_group_count, batch_group_count)
        missing = pointwise_lacks(rhs.shape[:-2], window_strides, padding, dilations, groups)
        if numbers != lax.ConvDimensionNumbers(channels_last, kernel_last, channels_last):
            missing.append("channels last")
        if missing:
            raise ValueError(
                f"{name}: low-rank backprop takes 1x1 convolutions only; this one, on {list(lhs.shape)} with a kernel "
                f"{list(rhs.shape)}, lacks {', '.join(missing)}. Leave this layer dense"
            )
        return low_rank_matmul(
            lhs,
            rhs.reshape(rhs.shape[-2:]),
            self.spec,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
            name=name,
        )
