"""What one product of a model costs in the backward pass as computed here: FLOPs, and bytes kept for it."""

import math

from lbpwht_jax.cost.trace import Product
from lbpwht_jax.ops.basis import coefficient_count
from lbpwht_jax.ops.coders import has_row_steps
from lbpwht_jax.ops.layer_flops import backward_flops
from lbpwht_jax.ops.spec import Grid, LowRankSpec

_FLOAT32 = 4


def matmul_flops(product: Product, spec: LowRankSpec | None) -> int:
    """Backward FLOPs per image: products and Walsh transforms, 2 per multiply-add.

    The projection of the inputs, done in the forward pass, is charged to the backward pass.

    Args:
      product: the product in the forward pass.
      spec: its backward pass; ``None`` for an exact one.

    Raises:
      ValueError: if a low-rank product's token grid is not known.
    """
    if spec is None:
        return 2 * product.inside_macs * (product.needs_dx + product.needs_dw)
    grid, repeats = _grid(product)
    needs = {"dx": bool(product.needs_dx), "dw": product.needs_dw}
    return repeats * backward_flops(spec, grid, product.prefix_tokens, *product.channels, **needs)


def saved_bytes(product: Product, spec: LowRankSpec | None) -> int:
    """Bytes per image that the kernel's gradient needs of the forward pass: the input or its coefficients, in float32 or codes.

    Args:
      product: a layer's product in the forward pass.
      spec: its backward pass; ``None`` for an exact one.

    Raises:
      ValueError: if a low-rank product's token grid is not known.
    """
    if not product.needs_dw:
        return 0
    channels = product.channels[0]
    if spec is None or spec.dw == "exact":
        elements = product.input_elements
    else:
        grid, repeats = _grid(product)
        elements = repeats * (product.prefix_tokens + coefficient_count(spec, grid)) * channels
    if product.input_bits is None:
        return _FLOAT32 * elements
    rows = elements // channels
    return rows * math.ceil(channels * product.input_bits / 8) + _FLOAT32 * (rows if has_row_steps(channels) else 1)


def _grid(product: Product) -> tuple[Grid, int]:
    """The token grid of a product, and how many such grids an image has."""
    if product.grid is None:
        raise ValueError(f"{product.path}: its token grid is not known, so it cannot be low-rank")
    return product.grid, product.tokens // (product.prefix_tokens + math.prod(product.grid))
