"""What a run is: the model and how it is adapted, the data, the recipe. ``config.json`` of its folder holds nothing less."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lbpwht_jax.adaptation.linen import AdaptedModule, adapt
from lbpwht_jax.data import Augmentation, Dataset
from lbpwht_jax.adaptation.presets import Train, parse_method
from lbpwht_jax.models import model_info, plain_model
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.weights.pretrained import load_pretrained
from lbpwht_jax.train import Placement, Recipe, TrainState, initial_state
from lbpwht_jax.weights.files import BUNDLED, bundled_file, replace_head

DType = Literal["float32", "bfloat16"]
Projection = Literal["fitted", "official"]
When = Literal["always", "faster"]
BUNDLED_WEIGHTS, NO_WEIGHTS = "bundled", "none"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
      model: its name.
      pretrained: what training starts from: "bundled", "none", or as ``load_pretrained`` takes it.
      image_size: height and width of the images, in pixels.
      channels, mean, std, interpolation, crop: what the model takes, as of ``ModelInfo``.
      dataset: as ``open_dataset`` takes it.
      data_dir: likewise.
      classes: their names.
      method: a short name, as ``parse_method`` takes it.
      train: what is trained.
      projection: of low-rank backpropagation.
      when: whether layers that low rank would make slower stay exact, as in ``LowRankSpec``.
      dtype: of the computation; parameters are float32.
      remat: whether blocks are computed again in the backward pass.
      recipe: how to train.
    """

    model: str
    pretrained: str
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float
    dataset: str
    data_dir: str | None
    classes: tuple[str, ...]
    method: str
    train: Train
    projection: Projection
    when: When
    dtype: DType
    remat: bool
    recipe: Recipe

    @property
    def info(self) -> ModelInfo:
        """Of the model, its images as the run normalised them."""
        images = {name: getattr(self, name) for name in ("channels", "mean", "std", "interpolation", "crop")}
        info = model_info(self.model)
        return dataclasses.replace(info, images=dataclasses.replace(info.images, **images))

    def module(self) -> nn.Module:
        """The plain model, batch normalisation on its running statistics.

        Raises:
          ValueError: if there is no such model.
        """
        return plain_model(
            self.model,
            num_classes=len(self.classes),
            image_size=self.image_size,
            dtype=None if self.dtype == "float32" else jnp.dtype(self.dtype),
            drop_path=self.recipe.drop_path,
            remat=self.remat,
            frozen_batch_norm=True,
        )

    def check_classes(self, dataset: Dataset) -> None:
        """Whether a data set has the run's classes.

        Raises:
          ValueError: if it has others, or in another order.
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
          ValueError: if a name is unknown, or the method trains nothing.
        """
        rules = parse_method(self.method, projection=self.projection, when=self.when).rules(self.info, self.train)
        return adapt(self.module(), rules, self.images())

    def start(self, model: AdaptedModule) -> dict[str, Any]:
        """The variables to start from, with a new head and branches that follow from the seed.

        Args:
          model: as ``adapted`` returns it.

        Raises:
          ValueError, FileNotFoundError, ImportError: as ``load_pretrained`` does.
        """
        key = jax.random.key(self.recipe.seed)
        fresh = model.module.init(key, jnp.zeros(self.images().shape))
        if self.pretrained == NO_WEIGHTS:
            variables = fresh
        elif self.pretrained == BUNDLED_WEIGHTS:
            with bundled_file() as path:
                variables = replace_head(load_pretrained(BUNDLED, path, image_size=self.image_size), fresh)
        else:
            variables = replace_head(load_pretrained(self.model, self.pretrained, image_size=self.image_size), fresh)
        return model.with_branches(jax.random.fold_in(key, 1), variables)

    def abstract_state(self, model: AdaptedModule, placement: Placement) -> TrainState:
        """Shapes, dtypes and shardings of the run's state, without reading any weights."""
        variables = jax.eval_shape(model.init, jax.random.key(0), self.images())
        optimizer, ema = self.recipe.optimizer(1), self.recipe.ema > 0
        return placement.abstract(jax.eval_shape(lambda v: initial_state(v, optimizer, model.trainable, ema), variables))

    def to_json(self) -> dict[str, Any]:
        """As JSON values by name."""
        return _listed(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of ``to_json``; values it does not know are left out.

        Raises:
          ValueError: if some are missing, or make no recipe.
        """
        try:
            recipe = {name: _tupled(value) for name, value in values["recipe"].items()}
            recipe["augmentation"] = Augmentation(**{k: _tupled(v) for k, v in recipe["augmentation"].items()})
            fields = {field.name: _tupled(values[field.name]) for field in dataclasses.fields(cls)}
            return cls(**{**fields, "recipe": Recipe(**recipe)})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no configuration of this version's: {type(error).__name__}: {error}") from None

    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one image, as a batch."""
        return jax.ShapeDtypeStruct((1, self.image_size, self.image_size, self.channels), jnp.float32)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + " ..." * (len(names) > 5)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _listed(item) for name, item in value.items()}
    return list(map(_listed, value)) if isinstance(value, tuple) else value
