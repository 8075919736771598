"""What a training step costs: backward FLOPs and bytes kept for the backward pass, read off JAX's own program.

FLOPs are those of matrix products and convolutions, Walsh transforms included (they are products here), 2 per multiply-add.
Multiplications with the zeros of a convolution's padding and dilation are left out, as XLA counts, and so is element-wise
work. The projection of the inputs, which low-rank layers do in the forward pass, is charged to the backward pass.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lbpwht_jax.ops.flops import product_flops

Variables = Mapping[str, Any]


def _loss(model: Any, variables: Variables, images: jax.Array) -> jax.Array:
    rngs = {"dropout": jax.random.key(0)}
    mutable = [name for name in variables if name != "params"]
    logits, _ = model.apply(variables, images, train=True, rngs=rngs, mutable=mutable)
    labels = jnp.zeros(images.shape[0], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def _split(variables: Variables) -> tuple[Any, dict[str, Any]]:
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def abstract_variables(model: Any, image_shape: tuple[int, int, int]) -> Any:
    """Shapes and dtypes of a model's variables, for images of a height, width and number of channels."""
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def backward_flops(model: Any, variables: Variables, image_shape: tuple[int, int, int]) -> int:
    """Backward FLOPs per image of training every parameter on a cross-entropy loss.

    Args:
      model: a Linen module or ``AdaptedModule``, called as ``model.apply(variables, images, train=True)``, returning logits.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.

    Returns:
      FLOPs of forward and backward together less those of the forward pass alone.
    """
    params, others = _split(variables)

    def loss(params, others, images):
        return _loss(model, {"params": params, **others}, images)

    arguments = (params, others, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return product_flops(jax.value_and_grad(loss), *arguments) - product_flops(loss, *arguments)


def abstract_pullback(model: Any, variables: Variables, image_shape: tuple[int, int, int], images: int) -> Any:
    """What ``jax.vjp`` of a cross-entropy loss by all parameters returns: shapes and dtypes of all that is kept.

    Args:
      model: a Linen module or ``AdaptedModule``, called as ``model.apply(variables, images, train=True)``, returning logits.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.
      images: how many.

    Returns:
      The function from the loss's cotangent to the parameters', a pytree of ``jax.ShapeDtypeStruct``.
    """
    params, others = _split(variables)

    def pullback(params, others, images):
        return jax.vjp(lambda params: _loss(model, {"params": params, **others}, images), params)[1]

    return jax.eval_shape(pullback, params, others, jax.ShapeDtypeStruct((images, *image_shape), jnp.float32))


def residual_bytes(model: Any, variables: Variables, image_shape: tuple[int, int, int]) -> int:
    """Bytes per image that the backward pass of a cross-entropy loss keeps from the forward pass.

    These are all the residuals of ``jax.vjp`` that grow with the batch, of every layer, low-rank or not; parameters are not
    among them. A compiler may keep fewer.

    Args:
      model: a Linen module or ``AdaptedModule``, called as ``model.apply(variables, images, train=True)``, returning logits.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.

    Returns:
      Bytes per image, in the dtypes the model computes in.
    """

    def size(images: int) -> int:
        kept = abstract_pullback(model, variables, image_shape, images)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    return size(3) - size(2)
