"""Counts every model of the registry for ``lbpwht models``.

    python experiments/model_table.py

Counting takes a while, so the table comes with the package: lbpwht_jax/bundled/models.json. Tests compare it with the models
(``pytest -m heavy tests/cli/test_models.py``).
"""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lbpwht_jax.models import list_models, model_info, plain_model
from lbpwht_jax.ops.flops import product_flops

TABLE = Path(__file__).parents[1] / "lbpwht_jax" / "bundled" / "models.json"


def describe(name: str) -> dict[str, Any]:
    """Counts a model from shapes alone, at 1000 classes: nothing is computed or allocated.

    Returns:
      Its parameters, multiply-accumulates of the forward pass per image, image size, number of layers that low-rank backprop
      adapts by default, the regular expression that these match, and the name of its class.

    Raises:
      ValueError: if the name is unknown.
    """
    info, module = model_info(name), plain_model(name)
    images = jax.ShapeDtypeStruct((1, *info.images.shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    kernels = [path.removesuffix("/kernel") for path in leaves if path.endswith("/kernel")]
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in leaves.values()),
        "macs": product_flops(functools.partial(module.apply, train=False), variables, images, padding=True) // 2,
        "image_size": info.images.size,
        "low_rank_layers": sum(re.search(info.layers.low_rank, path) is not None for path in kernels),
        "pattern": info.layers.low_rank,
        "family": info.module.__name__,
    }


def main() -> None:
    """Writes the table."""
    TABLE.write_text(json.dumps({name: describe(name) for name in list_models()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
