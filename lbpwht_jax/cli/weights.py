"""The commands that rewrite weights: ``lbpwht convert`` and ``lbpwht export``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lbpwht_jax.cli.help import flag
from lbpwht_jax.models import list_models, plain_model
from lbpwht_jax.runs.finished import FINAL, load_run
from lbpwht_jax.runs.folder import read_config
from lbpwht_jax.screen import console, say
from lbpwht_jax.weights import export_weights, load_pretrained
from lbpwht_jax.weights.pretrained import number_of_classes
from lbpwht_jax.weights.sources import class_names
from lbpwht_jax.weights.write import check_output

_Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
_Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
_Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Reads published weights of any known layout and writes them as this library keeps them (.safetensors)."""

    model: _Model
    """Name of the model; "lbpwht models" lists them."""
    source: _Source
    """A .safetensors, .pth or .bin file, a Hugging Face folder, or a hub id such as timm/deit_tiny_patch16_224.fb_in1k."""
    output: _Output
    """The .safetensors file to write."""
    num_classes: Annotated[int | None, flag("INT", "the weights' head stays")] = None
    """Starts a new head, of zeros, for this many classes if the weights' head has another number."""
    image_size: Annotated[int | None, flag("INT", "the model's")] = None
    """Resamples position embeddings and attention biases for images of this height and width, in pixels."""
    offline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Takes hub weights from the local cache alone, without the network."""

    def prepare(self) -> None:
        """Writes the file; raises what ``load_pretrained`` and ``export_weights`` raise."""
        _rewrite(self, self.source, self.output, "flax")


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes weights, such as fine-tuned ones, for timm ("load_state_dict(..., strict=True)") or as this library keeps them.

    "lbpwht export RUN OUTPUT" writes what a run made; "lbpwht export MODEL SOURCE OUTPUT" rewrites a file.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|MODEL")]
    """A run folder; or the name of a model, which "lbpwht models" lists."""
    source: Annotated[str | None, tyro.conf.Positional, flag("[SOURCE]", "left out for a run")] = None
    """For a model: a .safetensors file of this library or timm, or anything "lbpwht convert" reads. Left out for a run."""
    output: Annotated[Path | None, tyro.conf.Positional, flag("OUTPUT", "none: it must be named")] = None
    """The .safetensors file to write."""
    checkpoint: str = FINAL
    """For a run: final; or a checkpoint, also if it is not finished: last, best or the number of its step."""
    format: Literal["timm", "flax"] = "timm"
    """timm: timm's names and layouts. flax: this library's."""
    num_classes: Annotated[int | None, flag("INT", "the weights' head stays")] = None
    """Starts a new head, of zeros, for this many classes if the weights' head has another number."""
    image_size: Annotated[int | None, flag("INT", "the model's")] = None
    """Height and width of the images the weights are for, in pixels."""
    offline: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Takes hub weights from the local cache alone, without the network."""

    def prepare(self) -> None:
        """Writes the file.

        Raises:
          ValueError: if the file to write is not named, or an option belongs to the other use; and what ``load_pretrained`` and
            ``load_run`` raise.
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
        output = Path(self.source)
        read_config(Path(self.model))  # tells at once that there is no run
        _check(output)
        run = load_run(Path(self.model), self.checkpoint)
        _write(run.config.model, run.module, run.variables, output, self.format, run.config.classes)


def _rewrite(command: Convert | Export, source: str, output: Path, format: Literal["timm", "flax"]) -> None:
    _check(output)
    variables = load_pretrained(command.model, source, command.num_classes, command.image_size, offline=command.offline)
    classes = number_of_classes(command.model, variables)
    module = plain_model(command.model, num_classes=classes, image_size=command.image_size)
    names = class_names(source, offline=command.offline)
    _write(command.model, module, variables, output, format, names if names and len(names) == classes else None)


def _check(output: Path) -> None:
    check_output(output)
    if output.suffix != ".safetensors":
        raise ValueError(
            f"{output}: only .safetensors files are written; name it {output.with_suffix('.safetensors').name} (in Python, "
            "safetensors.torch.load_file reads it for load_state_dict)"
        )


def _write(
    name: str,
    module: Any,
    variables: Any,
    output: Path,
    format: Literal["timm", "flax"],
    classes: Sequence[str] | None = None,
) -> None:
    export_weights(name, module, variables, output, format, classes)
    say(console(), f"{output}: {name} for {module.num_classes} classes at {module.image_size} pixels, {format} layout")
