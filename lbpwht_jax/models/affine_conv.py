"""A convolution that applies a normalisation behind it as one with itself."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lbpwht_jax.ops import affine as affines
from lbpwht_jax.ops.affine import Affine
from lbpwht_jax.ops.affine_product import affine_product
from lbpwht_jax.ops.convolution import Convolution, ConvProduct
from lbpwht_jax.ops.platforms import is_narrow


class AffineConv(nn.Conv):
    """``nn.Conv`` with one stride and one number of zeros for all sides, and ``ConvProduct``; the same parameters."""

    @nn.compact
    def __call__(self, inputs: jax.Array, affine: Affine | None = None) -> jax.Array:
        """Convolves.

        Args:
          inputs: ``[batch, height, width, channels]``.
          affine: a normalisation by constant statistics and an activation, applied to the result as one with the convolution
            unless the model is adapted here, or the dtype is narrow, in which the kernel cannot take the factors.

        Returns:
          ``[batch, height', width', features]``.
        """
        product = self.conv_general_dilated
        if affine is None:
            return super().__call__(inputs)
        dtype = jnp.result_type(inputs, self.param_dtype) if self.dtype is None else self.dtype
        if is_narrow(dtype) or not isinstance(product, ConvProduct):
            return affines.apply(super().__call__(inputs), affine)
        fields: Any = self  # of more types in Flax than here
        stride, side = fields.strides, (fields.padding, fields.padding)
        shape = (*fields.kernel_size, inputs.shape[-1] // self.feature_group_count, self.features)
        kernel: Any = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias: Any = self.param("bias", self.bias_init, shape[-1:], self.param_dtype)
        x, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        convolution = Convolution((stride, stride), (side, side), self.feature_group_count)
        return affine_product(convolution, x, kernel, affine.after(bias), product.bits)
