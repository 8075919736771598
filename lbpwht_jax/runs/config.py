"""What a run is: the model and how it is adapted, the data, the recipe; all that ``config.json`` of its folder must hold."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import pydantic.dataclasses
from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter, model_validator

from lbpwht_jax.adaptation import AdaptedModule, Plan, Train, adapt, parse_method, with_loops
from lbpwht_jax.data import Dataset
from lbpwht_jax.data.validation import STRICT, plain_errors
from lbpwht_jax.models import ModelInfo, model_info, plain_model
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.train import Placement, Recipe, TrainState, initial_state
from lbpwht_jax.weights import BUNDLED, load_pretrained, replace_head
from lbpwht_jax.weights.files import bundled_file
from lbpwht_jax.weights.sources import class_names, local_file

DType = Literal["float32", "bfloat16"]
Projection = Literal["fitted", "official"]
When = Literal["always", "faster"]
BUNDLED_WEIGHTS, NO_WEIGHTS = "bundled", "none"


def _known_model(name: str) -> str:
    model_info(name)
    return name


_SOME_PLAN = Plan((), 8, "flops", 1.0, 1.0, 0.0, 0.0, 0.0)  # stands for that of a run where a method is checked alone


def _known_method(method: str) -> str:
    parse_method(method, _SOME_PLAN)
    return method


# config.json also tells which versions and device made the run: what a run is does not depend on them
@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(**{**STRICT, "extra": "ignore"}))
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
      model: the model's name.
      pretrained: what training starts from: "bundled", "none", or a source that ``load_pretrained`` takes.
      image_size: height and width of the images, in pixels.
      channels, mean, std, interpolation, crop: how images are prepared for the model, as in ``ModelInfo``.
      dataset: the data set's name, as for ``open_dataset``.
      data_dir: the folder of TFDS data sets, as for ``open_dataset``.
      classes: names of the classes, in the order of the labels.
      method: a short name, as for ``parse_method``.
      train: what is trained.
      projection: how low-rank backpropagation projects blocks that the grid does not fill.
      when: whether layers that low rank would make slower stay exact, as in ``LowRankSpec``.
      dtype: dtype of the computation; parameters are float32.
      remat: whether blocks are computed again in the backward pass.
      recipe: how to train.
      residuals: what is kept for the backward pass, as in ``create_model``.
      scan_blocks: whether equal blocks run as loops, as in ``create_model``.
      validation: the share of the training images that is held out to choose the best epoch by; 0 for none. A data set that has
        validation images of its own needs none.
      lora_alpha: LoRA's branches are multiplied by this over their rank (``Method.alpha``).
      lora_dropout: probability of zeros in the input of LoRA's branches while training.
      plan: the functions that each layer keeps, where the method is a plan.
      extended: for each time that the run went on with another number of epochs, the step from which it did, and the number of
        epochs until then; ``recipe`` has the number since.

    Raises:
      pydantic.ValidationError: (a ValueError) if a value has the wrong type, is out of range or is an unknown name.
    """

    model: Annotated[str, AfterValidator(_known_model)]
    pretrained: str
    image_size: PositiveInt
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[PositiveFloat, ...]
    interpolation: Literal["bicubic", "bilinear"]
    crop: Annotated[float, Field(gt=0, le=1)]
    dataset: str
    data_dir: str | None
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    method: Annotated[str, AfterValidator(_known_method)]
    train: Train
    projection: Projection
    when: When
    dtype: DType
    remat: bool
    recipe: Recipe
    residuals: ResidualsName = "plain"
    scan_blocks: bool = False
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora_alpha: PositiveFloat = 8.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    extended: tuple[tuple[NonNegativeInt, PositiveInt], ...] = ()
    plan: Plan | None = None

    @model_validator(mode="after")
    def _one_per_channel(self) -> "RunConfig":
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} must have {self.channels} numbers, one per channel, got {getattr(self, name)}")
        return self

    @model_validator(mode="after")
    def _a_plan_where_named(self) -> "RunConfig":
        if (self.plan is None) == (parse_method(self.method, self.plan or _SOME_PLAN).plan is not None):
            raise ValueError(f"method {self.method} {'needs' if self.plan is None else 'has no use for'} a plan")
        if self.plan is not None and self.projection != "fitted":
            raise ValueError(f"projection {self.projection} does not go with a plan, whose projections are fitted")
        return self

    @property
    def info(self) -> ModelInfo:
        """What the registry knows of the model, its images prepared as the run did."""
        images = {name: getattr(self, name) for name in ("channels", "mean", "std", "interpolation", "crop")}
        info = model_info(self.model)
        return dataclasses.replace(info, images=dataclasses.replace(info.images, **images))

    def module(self) -> nn.Module:
        """The plain model; batch normalisation is on its running statistics, unless training starts from random weights."""
        return plain_model(
            self.model,
            num_classes=len(self.classes),
            image_size=self.image_size,
            dtype=None if self.dtype == "float32" else jnp.dtype(self.dtype),
            drop_path=self.recipe.drop_path,
            remat=self.remat,
            residuals=self.residuals,
            frozen_batch_norm=self.pretrained != NO_WEIGHTS,
        )

    def check_classes(self, dataset: Dataset) -> None:
        """Checks that a data set has the run's classes.

        Raises:
          ValueError: if it has others, or the same in another order.
        """
        if dataset.classes == self.classes:
            return
        new, missing = (sorted(set(a) - set(b)) for a, b in ((dataset.classes, self.classes), (self.classes, dataset.classes)))
        parts = [f"{len(dataset.classes)} instead of {len(self.classes)}"] * (len(dataset.classes) != len(self.classes))
        parts += [f"{_few(new)} new"] * bool(new) + [f"{_few(missing)} missing"] * bool(missing)
        raise ValueError(
            f"{dataset.name} has other classes than the run, which knows no more than those it was trained on: "
            + ("; ".join(parts) or "the same in another order")
        )

    def adapted(self) -> AdaptedModule:
        """The model under the method's rules.

        Raises:
          ValueError: if the method trains nothing.
        """
        method = parse_method(self.method, self.plan, projection=self.projection, when=self.when)
        if method.plan is not None:
            method.plan.check(self.model, self.image_size, self.train)
        method = dataclasses.replace(method, alpha=self.lora_alpha, dropout=self.lora_dropout)
        adapted = adapt(self.module(), method.rules(self.info, self.train), self.images())
        return with_loops(adapted, self.images()) if self.scan_blocks else adapted

    def start(self, model: AdaptedModule) -> dict[str, Any]:
        """The variables that training starts from; head and LoRA's branches are new and follow from the seed.

        Args:
          model: what ``adapted`` returned.

        Raises:
          ValueError, FileNotFoundError, ImportError: if ``load_pretrained`` raises it.
        """
        key = jax.random.key(self.recipe.seed)
        fresh = model.module.init(key, jnp.zeros(self.images().shape))
        if self.pretrained == NO_WEIGHTS:
            variables = fresh
        elif self.pretrained == BUNDLED_WEIGHTS:
            with bundled_file() as path:
                variables = replace_head(load_pretrained(BUNDLED, path, image_size=self.image_size), fresh)
        else:
            keeps = self.keeps_head()
            classes = None if keeps else len(self.classes)  # the file may have no head
            variables = load_pretrained(self.model, self.pretrained, classes, self.image_size)
            variables = variables if keeps else replace_head(variables, fresh)
        return model.with_branches(jax.random.fold_in(key, 1), variables)

    def keeps_head(self) -> bool:
        """Whether training starts from a head for the very classes of the data, as a finished run's: its file names them."""
        if self.pretrained in (NO_WEIGHTS, BUNDLED_WEIGHTS) or local_file(self.pretrained) is None:
            return False
        return class_names(self.pretrained) == [*self.classes]

    def with_epochs(self, epochs: int, step: int) -> "RunConfig":
        """The run with another number of epochs from a step on; what was planned to happen after that step is forgotten."""
        known = [(at, before) for at, before in self.extended if at <= step]
        later = [before for at, before in self.extended if at > step]
        before = later[0] if later else self.recipe.epochs
        extended = (*known, (step, before)) if before != epochs else tuple(known)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, epochs=epochs), extended=extended)

    def abstract_state(self, model: AdaptedModule, placement: Placement) -> TrainState:
        """Shapes, dtypes and shardings of the run's state, without reading any weights."""
        variables = jax.eval_shape(model.init, jax.random.key(0), self.images())
        optimizer, ema = self.recipe.optimizer(1), self.recipe.ema > 0
        return placement.abstract(jax.eval_shape(lambda v: initial_state(v, optimizer, model.trainable, ema), variables))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values by name."""
        return _JSON.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "") -> "RunConfig":
        """Reads what ``to_json`` returned, written as JSON; other values beside the run's fields are left out.

        Args:
          text: the JSON.
          where: the file it was read from, for messages.

        Raises:
          ValueError: if a field is missing, of another type, out of range or an unknown name; names the field.
        """
        with plain_errors(where):
            return _JSON.validate_json(text)

    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of one image."""
        return jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.channels), jnp.float32)


def differences(ours: Any, theirs: Any, within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ between two configurations, in order: name, such as ``"recipe.lr"``, and both values."""
    for field in dataclasses.fields(ours):
        name, one, other = f"{within}{field.name}", getattr(ours, field.name), getattr(theirs, field.name)
        if dataclasses.is_dataclass(one) and dataclasses.is_dataclass(other):
            yield from differences(one, other, f"{name}.")
        elif one != other:
            yield name, one, other


def check_unchanged(config: RunConfig, recorded: Mapping[str, Any], folder: Path, step: int) -> None:
    """Checks that a run's ``config.json`` is still the configuration that a checkpoint was made with.

    Args:
      config: what the file says now.
      recorded: the checkpoint's, JSON values by name.
      folder: the run's folder.
      step: the checkpoint's.

    Raises:
      ValueError: if they differ in more than where the data lies; names the field and both values.
    """
    was = RunConfig.from_json(json.dumps(recorded), f"checkpoint {step} of {folder}")
    known = len(was.extended)
    if len(config.extended) > known:  # it went on with other epochs after this checkpoint
        recipe = dataclasses.replace(config.recipe, epochs=config.extended[known][1])
        config = dataclasses.replace(config, recipe=recipe, extended=config.extended[:known])
    for name, now, then in differences(config, was):
        if name != "data_dir":
            raise ValueError(
                f"{folder / 'config.json'}: {name} is {now!r}, but checkpoint {step} was made with {then!r}; put it back, or "
                "start a new run"
            )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


_JSON = TypeAdapter(RunConfig)
