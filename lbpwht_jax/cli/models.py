"""``lbpwht models``: which models there are."""

import dataclasses
import functools
import math
import re
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from flax import traverse_util
from rich.console import Console
from rich.table import Table

from lbpwht_jax.models import list_models, model_info, plain_model
from lbpwht_jax.ops.flops import product_flops


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models: parameters, forward multiply-accumulates, image size, and the layers low-rank backprop adapts."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell-style pattern the names match, such as "eff*"."""

    def prepare(self) -> None:
        """Prints the table.

        Raises:
          ValueError: if no name matches.
        """
        names = list_models(self.pattern)
        if not names:
            raise ValueError(f"no model matches {self.pattern!r}; `lbpwht models` lists all")
        table = Table(title="1000 classes; GMACs: forward pass of one image", title_justify="left")
        table.add_column("model", no_wrap=True)
        for title in ("parameters", "GMACs", "image size", "low-rank layers"):
            table.add_column(title, justify="right")
        for name in names:
            row, size = describe(name), str(model_info(name).images.size)
            table.add_row(name, f"{row.parameters:,}", f"{row.macs / 1e9:.2f}", size, str(row.low_rank_layers))
        console = Console()
        console.print(table)
        console.print("Low-rank layers, by the regular expression their paths match:")
        for family, layers in sorted({(model_info(name).module.__name__, model_info(name).layers.low_rank) for name in names}):
            console.print(f"  {family}: {layers}", markup=False, highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Description:
    """What ``lbpwht models`` counts of one model.

    Attributes:
      parameters: trainable numbers, at 1000 classes.
      macs: multiply-accumulates of the forward pass per image.
      low_rank_layers: layers that low-rank backprop adapts by default.
    """

    parameters: int
    macs: int
    low_rank_layers: int


def describe(name: str) -> Description:
    """Counts a model from shapes alone: nothing is computed or allocated.

    Raises:
      ValueError: if the name is unknown.
    """
    info, module = model_info(name), plain_model(name)
    images = jax.ShapeDtypeStruct((1, *info.images.shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    kernels = [path.removesuffix("/kernel") for path in leaves if path.endswith("/kernel")]
    return Description(
        parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        macs=product_flops(functools.partial(module.apply, train=False), variables, images, padding=True) // 2,
        low_rank_layers=sum(re.search(info.layers.low_rank, path) is not None for path in kernels),
    )
