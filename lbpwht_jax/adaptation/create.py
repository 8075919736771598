"""``create_model``: the models of the registry by timm's names, low-rank where asked."""

import difflib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.adaptation.linen import LowRankModel
from lbpwht_jax.adaptation.linen_layers import find_layers
from lbpwht_jax.adaptation.loops import with_loops
from lbpwht_jax.adaptation.matching import resolve_rules
from lbpwht_jax.adaptation.plan import Plan
from lbpwht_jax.adaptation.rules import LowRank
from lbpwht_jax.models import model_info, plain_model
from lbpwht_jax.ops.residuals import Residuals
from lbpwht_jax.ops.spec import LowRankSpec


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | None = None,
    dtype: Any = None,
    drop_path: float = 0.0,
    remat: bool = False,
    frozen_batch_norm: bool = False,
    residuals: str | Residuals = "plain",
    scan_blocks: bool = False,
    spec: LowRankSpec | None = None,
    layers: str | None = None,
    plan: Plan | None = None,
) -> nn.Module:
    """A Linen model by its timm name; call it as ``model.apply(variables, images, train=False)``.

    Args:
      name: one of ``list_models()``.
      num_classes: outputs of the head.
      image_size: height and width of the images, in pixels; by default what the model was trained at.
      dtype: dtype of the computation (parameters stay float32).
      drop_path: probability of dropping the last block's residual branches while training, rising linearly to it.
      remat: recomputes each block in the backward pass instead of keeping its activations.
      frozen_batch_norm: keeps batch normalisation on its running statistics while training.
      residuals: what is kept for the backward pass: ``"plain"``, what JAX keeps of itself; ``"exact"``, less, without rounding;
        ``"lean"``, 8 bits; ``"tiny"``, 2 to 8 bits; or a ``Residuals``.
      scan_blocks: runs equal blocks in a row as one loop over their stacked parameters (``jax.lax.scan``): what is kept for
        the backward pass is then what the blocks keep and nothing else, whatever the compiler, and one block is compiled
        instead of many. Variables are as without. Within another module, blocks run one by one. The model is traced once, on
        shapes alone.
      spec: low-rank backprop for the layers that ``layers`` matches; ``None`` backpropagates exactly. With a spec the model
        is traced once, on shapes alone.
      layers: regular expression searched in the paths of the layers on token grids, such as ``"mlp/fc[12]$"``; by default
        the paper's choice.
      plan: what each layer keeps, instead of ``spec`` and ``layers``, as ``lbpwht_jax.plan.plan`` or ``load_plan`` returns it.

    Returns:
      The module, taking ``[batch, image_size, image_size, channels]`` and returning ``[batch, num_classes]`` logits. Its
      variables have the same names with and without ``spec``.

    Raises:
      ValueError: if the name is unknown; if ``num_classes`` is not positive or ``image_size`` is not from 1 to 8192; if
        ``layers`` is given without ``spec``, is no regular expression or matches no layer; if ``residuals`` is an
        unknown name; if the spec does not suit a layer's token grid, or the image size the model; if a plan was made for
        another model or image size, or is given together with a spec.
      TypeError: if ``spec`` is no ``LowRankSpec``, ``residuals`` neither a name nor a ``Residuals``, or ``num_classes`` or
        ``image_size`` no integer.
    """
    info = model_info(name)
    fields: dict[str, Any] = {"num_classes": num_classes, "image_size": image_size, "dtype": dtype, "drop_path": drop_path}
    model = plain_model(name, **fields, remat=remat, frozen_batch_norm=frozen_batch_norm, residuals=residuals)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, info.images.channels), jnp.float32)
    if plan is not None:
        if spec is not None or layers is not None:
            raise ValueError(f"create_model({name!r}): a plan says what each layer keeps; leave spec and layers out")
        plan.check(name, model.image_size)
    elif spec is None:
        if layers is not None:
            raise ValueError(f"create_model({name!r}): layers={layers!r} needs a spec to apply, such as spec=lp_l1(4)")
        return with_loops(model, images) if scan_blocks else model
    found = find_layers(model, (images,), {})
    gridded = [layer for layer in found.layers if layer.kind == "LowRankDense"]
    if spec is not None:
        rules = (LowRank(info.layers.low_rank if layers is None else layers, spec),)
        pattern = rules[0].pattern
        if not any(re.search(pattern, layer.path) for layer in gridded):
            nearest = difflib.get_close_matches(pattern, [layer.path for layer in gridded], n=5, cutoff=0.0)
            raise ValueError(
                f"create_model({name!r}): layers={layers!r} matches no layer on a token grid; "
                f"the nearest paths: {', '.join(nearest)}"
            )
    else:
        rules = plan.rules() if plan is not None else ()
    low_rank = LowRankModel(model, resolve_rules(found._replace(layers=gridded), rules))
    return with_loops(low_rank, images) if scan_blocks else low_rank
