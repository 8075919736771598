"""Linen layers with a low-rank backward pass."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops import normed_product
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.affine_product import affine_product, takes_factors
from lbpwht_jax.ops.coders import check_row_bits
from lbpwht_jax.ops.dtypes import static_precision
from lbpwht_jax.ops.exact import ExactProduct, exact_matmul
from lbpwht_jax.ops.gelu import check_slope_bits, coded_gelu, gelu
from lbpwht_jax.ops.matmul import Link, low_rank_matmul
from lbpwht_jax.ops.spec import Grid, LowRankSpec, lp_l1


class LowRankDense(nn.Module):
    """``nn.Dense`` with a low-rank backward pass along the token grid; the same arguments and parameters.

    The parameters are ``kernel``, ``[in, features]``, and ``bias``, ``[features]``: a checkpoint of ``nn.Dense`` loads as it
    is. The forward pass is the same.

    Attributes:
      features: output channels.
      spec: the Walsh functions kept; ``None`` backpropagates exactly, as ``nn.Dense`` does, in reverse mode only.
      grid: tokens along each axis, for inputs ``[..., prefix_tokens + tokens, channels]``; ``None`` for channels-last maps,
        ``[batch, height, width, channels]``.
      prefix_tokens: leading tokens outside the grid (class or register tokens), backpropagated exactly.
      use_bias: whether to add a bias.
      dtype: dtype of the computation; by default the one that inputs and parameters promote to.
      param_dtype: dtype of the parameters.
      precision: precision of the products, forward and backward, as for ``jax.lax.dot_general``.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      promote_dtype: function that brings input, kernel and bias to one dtype.
      preferred_element_type: dtype of the product, as for ``jax.lax.dot_general``.
      dot_general: function with the signature of ``jax.lax.dot_general`` that makes the product; ``spec`` is then not used.
        ``jax.lax.dot_general`` itself can be differentiated in forward mode as well.
      activation: ``"gelu"`` applies the exact GELU to the inputs first, as for ``low_rank_matmul``.
      slope_bits: in how many bits its slope is kept, 2, 3, 4 or 8; ``None`` keeps it as it is.
      input_bits: in how many bits the coefficients of the inputs are kept, or all of them where the layer is backpropagated
        exactly, 4 or 8; ``None`` keeps them as they are. ``dot_general`` keeps what it does by itself.
    """

    features: int
    spec: LowRankSpec | None = lp_l1(4)
    grid: Grid | None = None
    prefix_tokens: int = 0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    promote_dtype: Any = promote_dtype
    preferred_element_type: Any = None
    dot_general: Any = None
    activation: Literal["gelu"] | None = None
    slope_bits: int | None = None
    input_bits: int | None = None

    @nn.compact
    def __call__(
        self, inputs: jax.Array, link: Link | None = None, affine: Affine | None = None, before: Affine | None = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: ``[..., prefix_tokens + tokens, channels]`` with ``grid``, ``[batch, *grid, channels]`` without.
          link: joins this layer to its neighbour, as for ``low_rank_matmul``.
          affine: a normalisation by constant statistics and an activation, applied to the result as one with the layer, as
            for ``low_rank_matmul``.
          before: the same, applied to the inputs first, in place of ``activation``.

        Returns:
          Array of the inputs' shape with ``features`` channels.

        Raises:
          ValueError, TypeError: for a scalar, for bits that there are not, for an ``affine`` or ``before`` that does not fit,
            for ``before`` beside an activation, and whatever ``low_rank_matmul`` raises when tracing; the message
            names this module's path.
        """
        if not jnp.ndim(inputs):
            raise ValueError(f"{self._name}: the inputs must be [..., tokens, channels] or maps [..., channels], got a scalar")
        check_slope_bits(self.slope_bits, self._name)
        check_row_bits(self.input_bits, self._name)
        kernel = self.param("kernel", self.kernel_init, (jnp.shape(inputs)[-1], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        if self.dot_general is None and self.spec is not None:
            return low_rank_matmul(
                inputs,
                kernel,
                self.spec,
                self.grid,
                self.prefix_tokens,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
                bias=bias,
                activation=self.activation,
                slope_bits=self.slope_bits,
                input_bits=self.input_bits,
                link=link,
                affine=affine,
                before=before,
                name=self._name,
            )
        affines.check_affine(affine, self.features, self._name)
        affines.check_before(before, self.activation, inputs.shape[-1], self._name)
        if link is not None:
            link.check_given(before, self._name)
        precision = static_precision(self.precision)
        plain = self.dot_general is None and self.preferred_element_type is None
        if before is not None and not (plain and normed_product.takes(inputs, kernel, before, self.input_bits)):
            inputs, before = affines.apply(inputs, before), None
        if self.activation is not None:
            forward_mode = self.slope_bits is None and self.dot_general is not None
            inputs = gelu(inputs) if forward_mode else coded_gelu(inputs, self.slope_bits)
        how = {"precision": self.precision, "preferred_element_type": self.preferred_element_type}
        if affine is not None and bias is not None:
            affine, bias = affine.after(bias), None
        if affine is not None and plain and takes_factors(inputs, kernel):
            return affine_product(ExactProduct(precision), inputs, kernel, affine, self.input_bits)
        if before is not None:
            y = normed_product.normed_product(ExactProduct(precision), inputs, kernel, before)
        elif self.dot_general is None:
            y = exact_matmul(inputs, kernel, **how, bits=self.input_bits)
        else:
            y = self.dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())), **how)
        if affine is not None:
            return affines.apply(y, affine)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    @property
    def _name(self) -> str:
        return f"LowRankDense {'/'.join(self.path) or '(top level)'}"
