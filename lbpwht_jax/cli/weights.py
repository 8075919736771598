"""The commands about models and their weights: ``lbpwht models``, ``lbpwht convert`` and ``lbpwht export``."""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import traverse_util
from rich.console import Console
from rich.table import Table

from lbpwht_jax.models import list_models, model_info, plain_model
from lbpwht_jax.ops.flops import product_flops
from lbpwht_jax.runs.finished import FINAL, load_run
from lbpwht_jax.weights.pretrained import export_weights, load_pretrained, number_of_classes

_Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
_Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
_Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Reads published weights of any known layout and writes them as this library keeps them (.safetensors)."""

    model: _Model
    """Name of the model; `lbpwht models` lists them."""
    source: _Source
    """A .safetensors, .pth or .bin file, a Hugging Face folder, or a hub id such as timm/deit_tiny_patch16_224.fb_in1k."""
    output: _Output
    """The .safetensors file to write."""
    num_classes: int | None = None
    """Starts a new head, of zeros, for this many classes if the weights' head has another number."""
    image_size: int | None = None
    """Resamples position embeddings and attention biases for images of this height and width, in pixels."""
    offline: bool = False
    """Takes hub weights from the local cache alone, without the network."""

    def prepare(self) -> None:
        """Writes the file; raises as ``load_pretrained`` does."""
        _rewrite(self, self.source, self.output, "flax")


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes weights, such as fine-tuned ones, for timm (`load_state_dict(..., strict=True)`) or as this library keeps them.

    `lbpwht export RUN OUTPUT` writes what a run made; `lbpwht export MODEL SOURCE OUTPUT` rewrites a file.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MODEL")]
    """A run folder; or the name of a model, which `lbpwht models` lists."""
    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE]")] = None
    """Of a model: a .safetensors file of this library or timm, or anything `lbpwht convert` reads. Left out for a run."""
    output: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")] = None
    """The .safetensors file to write."""
    checkpoint: str = FINAL
    """Of a run: final; or a checkpoint, also if it is not finished: last, best or the number of its step."""
    format: Literal["timm", "flax"] = "timm"
    """timm: timm's names and layouts. flax: this library's."""
    num_classes: int | None = None
    """Starts a new head, of zeros, for this many classes if the weights' head has another number."""
    image_size: int | None = None
    """Height and width of the images the weights are for, in pixels; by default the model's."""
    offline: bool = False
    """Takes hub weights from the local cache alone, without the network."""

    def prepare(self) -> None:
        """Writes the file.

        Raises:
          ValueError: if the file to write is not named, or an option goes with the other use; and as ``load_pretrained`` and
            ``load_run`` do.
        """
        if self.output is None and self.model in list_models():
            raise ValueError(f"write lbpwht export {self.model} SOURCE OUTPUT, or lbpwht export RUN OUTPUT for a run folder")
        if self.source is None:
            raise ValueError(f"write lbpwht export {self.model} OUTPUT: the .safetensors file to write is not named")
        if self.output is not None:
            if self.checkpoint != FINAL:
                raise ValueError("--checkpoint goes with a run folder: lbpwht export RUN OUTPUT")
            _rewrite(self, self.source, self.output, self.format)
            return
        if self.num_classes is not None or self.image_size is not None:
            raise ValueError("--num-classes and --image-size do not go with a run folder, which has its own")
        run, output = load_run(Path(self.model), self.checkpoint), Path(self.source)
        _write(run.config.model, run.module, run.variables, output, self.format, run.config.classes)


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
    """What ``lbpwht models`` counts.

    Attributes:
      parameters: trainable numbers, at 1000 classes.
      macs: multiply-accumulates of the forward pass of one image.
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


def _rewrite(command: Convert | Export, source: str, output: Path, format: Literal["timm", "flax"]) -> None:
    variables = load_pretrained(command.model, source, command.num_classes, command.image_size, offline=command.offline)
    classes = number_of_classes(command.model, variables)
    module = plain_model(command.model, num_classes=classes, image_size=command.image_size)
    _write(command.model, module, variables, output, format)


def _write(
    name: str,
    module: Any,
    variables: Any,
    output: Path,
    format: Literal["timm", "flax"],
    classes: Sequence[str] | None = None,
) -> None:
    export_weights(name, module, variables, output, format, classes)
    print(f"{output}: {name} for {module.num_classes} classes at {module.image_size} pixels, {format} layout")
