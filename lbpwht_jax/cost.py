"""What a training step costs: backward FLOPs and bytes kept for the backward pass, read off JAX's own program.

FLOPs are those of matrix products and convolutions, Walsh transforms included (they are products here), 2 a multiply-add.
Element-wise work is not counted. The projection of the inputs, which low-rank layers do in the forward pass, is charged to
the backward pass.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Variables = Mapping[str, Any]


def product_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of the matrix products and convolutions that ``function``'s results depend on.

    Args:
      function: of arrays.
      *arguments: arrays or ``jax.ShapeDtypeStruct``; nothing is computed.

    Returns:
      FLOPs, 2 a multiply-add. A scan's body counts once a step, a while loop's once, a conditional's dearest branch.
    """
    program = jax.make_jaxpr(function)(*arguments)
    return _flops(program.jaxpr, [True] * len(program.jaxpr.outvars))[0]


def _flops(jaxpr: Jaxpr, wanted: list[bool]) -> tuple[int, list[bool]]:
    """FLOPs that the wanted outputs need, and which inputs they need."""
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    total = 0
    for equation in reversed(jaxpr.eqns):
        outputs = [v in live for v in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        count, inputs = _equation_flops(equation, outputs)
        total += count
        live |= {v for v, need in zip(equation.invars, inputs, strict=True) if need and not isinstance(v, Literal)}
    return total, [v in live for v in jaxpr.invars]


def _equation_flops(equation: Any, outputs: list[bool]) -> tuple[int, list[bool]]:
    every_input = [True] * len(equation.invars)
    shapes = [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[0][d] for d in contracted), every_input
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.params["dimension_numbers"].rhs_spec
        window = math.prod(shapes[1][d] for d in kernel[1:])
        return 2 * math.prod(equation.outvars[0].aval.shape) * window, every_input
    inner = [
        item.jaxpr if isinstance(item, ClosedJaxpr) else item
        for value in equation.params.values()
        for item in (value if isinstance(value, (tuple, list)) else (value,))
        if isinstance(item, (ClosedJaxpr, Jaxpr))
    ]
    calls_once = len(inner) == 1 and equation.primitive.name not in ("scan", "while")
    if calls_once and len(inner[0].invars) == len(equation.invars) and len(inner[0].outvars) == len(outputs):
        return _flops(inner[0], outputs)
    counts = [_flops(jaxpr, [True] * len(jaxpr.outvars))[0] for jaxpr in inner]
    if equation.primitive.name == "cond":
        return max(counts), every_input
    return sum(counts) * equation.params.get("length", 1), every_input


def _loss(model: nn.Module, variables: Variables, images: jax.Array) -> jax.Array:
    rngs = {"dropout": jax.random.key(0)}
    mutable = [name for name in variables if name != "params"]
    logits, _ = model.apply(variables, images, train=True, rngs=rngs, mutable=mutable)
    labels = jnp.zeros(images.shape[0], jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def _split(variables: Variables) -> tuple[Any, dict[str, Any]]:
    return variables["params"], {name: tree for name, tree in variables.items() if name != "params"}


def backward_flops(model: nn.Module, variables: Variables, image_shape: tuple[int, int, int]) -> int:
    """Backward FLOPs an image of training every parameter on a cross-entropy loss.

    Args:
      model: called as ``model.apply(variables, images, train=True)``, returning logits.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.

    Returns:
      FLOPs of forward and backward together less those of the forward pass alone.
    """
    params, others = _split(variables)

    def loss(params, images):
        return _loss(model, {"params": params, **others}, images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return product_flops(jax.value_and_grad(loss), params, images) - product_flops(loss, params, images)


def saved_bytes(model: nn.Module, variables: Variables, image_shape: tuple[int, int, int]) -> int:
    """Bytes an image that the backward pass of a cross-entropy loss keeps from the forward pass.

    These are all the residuals of ``jax.vjp`` that grow with the batch, of every layer, low-rank or not; parameters are not
    among them. A compiler may keep fewer.

    Args:
      model: called as ``model.apply(variables, images, train=True)``, returning logits.
      variables: its variables, arrays or ``jax.ShapeDtypeStruct``.
      image_shape: height, width and channels.

    Returns:
      Bytes.
    """
    params, others = _split(variables)

    def residuals(params, images):
        return jax.vjp(lambda params: _loss(model, {"params": params, **others}, images), params)[1]

    def size(batch: int) -> int:
        images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, images)))

    return size(3) - size(2)
