"""Training and evaluation on arrays in memory, for the transfer sweep."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transfer_images import Images

from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.train import Recipe, TrainState, everything, initialise, make_train_step, normalise

EVALUATION_BATCH = 250


def flip_and_shift(key: jax.Array, images: jax.Array, pixels: int = 4) -> jax.Array:
    """Mirrors each image left to right with probability one half, and moves it by up to ``pixels`` along both axes.

    Args:
      key: of the random choices.
      images: ``[batch, height, width, channels]``, uint8.
      pixels: how far an image moves at most; its edges are repeated.
    """
    flip, shift = jax.random.split(key)
    mirrored = jax.random.bernoulli(flip, 0.5, (images.shape[0], 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    offsets = jax.random.randint(shift, (images.shape[0], 2), 0, 2 * pixels + 1)
    zero = jnp.zeros((), offsets.dtype)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], zero), images.shape[1:]))(padded, offsets)


def train(
    model: Any,
    info: ModelInfo,
    variables: Any,
    images: Images,
    recipe: Recipe,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    trainable: Callable[[str], bool] = everything,
) -> Iterator[tuple[int, float, TrainState]]:
    """Trains with whole batches, shuffled anew every epoch.

    Yields:
      After every step its number from 1, the loss, and the state, which the next step donates.

    Raises:
      FloatingPointError: when the loss is no longer finite, naming the step.
    """
    per_epoch = len(images) // recipe.batch_size
    optimizer = recipe.optimizer(recipe.epochs * per_epoch)
    step = make_train_step(model, info, optimizer, recipe, augment)
    state = initialise(variables, optimizer, trainable)
    for number in range(recipe.epochs * per_epoch):
        epoch, position = divmod(number, per_epoch)
        if position == 0:
            order = np.random.default_rng((recipe.seed, epoch)).permutation(len(images))
        chosen = order[position * recipe.batch_size : (position + 1) * recipe.batch_size]
        state, loss, _ = step(state, images.images[chosen], images.labels[chosen])
        loss = float(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {number + 1}; lower the learning rate")
        yield number + 1, loss, state


def accuracy_of(model: Any, info: ModelInfo, variables: Any, test: Images) -> float:
    """Test accuracy in [0, 1], every image counted once."""

    @jax.jit
    def predict(variables, images):
        return model.apply(variables, normalise(images, info)).argmax(-1)

    batches = range(0, len(test), EVALUATION_BATCH)
    predicted = [np.asarray(predict(variables, test.images[start : start + EVALUATION_BATCH])) for start in batches]
    return float((np.concatenate(predicted) == test.labels).mean())
