"""The training step of a model under a method, ready to be run on arrays or compiled from shapes alone."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.presets import Train, adapted_model
from lbpwht_jax.data import Batch
from lbpwht_jax.models import model_info
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.residuals import RESIDUALS, ResidualsName
from lbpwht_jax.train import Placement, Recipe, TrainState, initial_state, make_train_step, placed_step

DType = Literal["float32", "bfloat16"]
_SWITCHES = {"remat": "remat", "scan": "scan_blocks"}
_STEPS = 1000  # of the learning rate's schedule: numbers in the program, which do not change its shape


@dataclasses.dataclass(frozen=True, eq=False)
class StepProgram:
    """One training step as ``lbpwht finetune`` runs it with its default recipe.

    Attributes:
      model: the model under the method's rules.
      info: what the registry knows of the model.
      recipe: its batch size, and how the step is made.
      classes: outputs of the model.
      placement: where the arrays live.
    """

    model: AdaptedModule
    info: ModelInfo
    recipe: Recipe
    classes: int
    placement: Placement

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images the model takes."""
        size = self.model.module.image_size
        return (size, size, self.info.images.channels)

    @functools.cached_property
    def optimizer(self) -> Any:
        """The optimiser that the recipe makes."""
        return self.recipe.optimizer(_STEPS)

    @functools.cached_property
    def step(self) -> Any:
        """The jitted ``step(state, batch) -> (state, metrics)``; the state given is donated."""
        size = self.model.module.image_size
        step = make_train_step(self.model, self.info, self.optimizer, self.recipe, size, self.classes)
        return placed_step(step, self.placement)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state; nothing is allocated."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), images)
        state = jax.eval_shape(lambda v: initial_state(v, self.optimizer, self.model.trainable), variables)
        return self.placement.abstract(state)

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a batch."""
        shapes = (self.image_shape, jnp.uint8), ((), jnp.int32), ((), jnp.bool_), ((), jnp.float32)
        at = self.placement.along_batch
        leaves: Any = [jax.ShapeDtypeStruct((self.recipe.batch_size, *shape), dtype, sharding=at) for shape, dtype in shapes]
        return Batch(*leaves)


def measured_model(
    name: str,
    method: str,
    train: Train = "all",
    num_classes: int = 1000,
    dtype: DType = "float32",
    when: Literal["always", "faster"] = "faster",
    residuals: ResidualsName = "plain",
) -> AdaptedModule:
    """A model under a method with options: ``residuals`` is what holds where the method says nothing of them.

    Raises:
      ValueError: if the model, the method or the residuals are unknown.
    """
    method, options = split_method(method)
    fields = {"dtype": None if dtype == "float32" else jnp.dtype(dtype), "residuals": residuals, **options}
    return adapted_model(name, method, train, num_classes, when=when, **fields)


def split_method(method: str) -> tuple[str, dict[str, Any]]:
    """A method's own name, and the fields of the model that the options at its end stand for.

    ``"+remat"`` computes each block again in the backward pass, ``"+scan"`` runs equal blocks as loops, and ``"+plain"``,
    ``"+exact"``, ``"+lean"`` and ``"+tiny"`` say what is kept for the backward pass, all as in ``create_model``.
    """
    fields: dict[str, Any] = {}
    while True:
        shorter, _, option = method.rpartition("+")
        if not shorter:
            return method, fields
        if option in _SWITCHES and _SWITCHES[option] not in fields:
            fields[_SWITCHES[option]] = True
        elif option in RESIDUALS and "residuals" not in fields:
            fields["residuals"] = option
        else:
            return method, fields
        method = shorter


def step_program(name: str, model: AdaptedModule, batch_size: int, num_classes: int, placement: Placement) -> StepProgram:
    """The training step of a model of the registry, adapted.

    Raises:
      ValueError: if there is no such model, or the devices cannot share the batch equally.
    """
    placement.check(batch_size, 1)
    return StepProgram(model, model_info(name), Recipe(1, batch_size), num_classes, placement)
