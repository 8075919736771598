"""One training step and one evaluation step: pure functions, to be compiled by ``jax.jit`` or ``jax.pmap``."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbpwht_jax.data import Batch, make_augmentation
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.ops.platforms import by_platform
from lbpwht_jax.train.placement import Placement
from lbpwht_jax.train.recipe import Recipe
from lbpwht_jax.train.state import TrainState


class Metrics(NamedTuple):
    """A training step's metrics.

    Attributes:
      loss: mean over the batch.
      accuracy: in [0, 1].
      gradient_norm: global norm of the gradients before clipping.
      finite: whether every number of the updated state is finite, bool.
    """

    loss: jax.Array
    accuracy: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array


class Sums(NamedTuple):
    """What an evaluation step counts over the valid images: correct ones, the sum of their losses, their number."""

    correct: jax.Array
    loss: jax.Array
    images: jax.Array


def normalise(images: jax.Array, info: ModelInfo) -> jax.Array:
    """Normalises float images ``[batch, height, width, channels]`` in [0, 1] as the model expects."""
    shape = (1, 1, 1, -1)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (info.images.mean, info.images.std))
    return (images - mean) / std


def make_train_step(
    model: Any,
    info: ModelInfo,
    optimizer: Any,
    recipe: Recipe,
    image_size: int,
    classes: int,
    axis: str | None = None,
    class_weights: np.ndarray | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the training step, which computes no gradients for frozen parameters.

    If the loss, the gradients or the updated state are not finite, the step returns the state as it was, with ``diverged`` set;
    no later step changes that state.

    Args:
      model: called as ``model.apply(variables, images, train=True)``: a Linen module, or an adapted one.
      info: how its images are normalised.
      optimizer: the optimiser that ``recipe.optimizer`` returns.
      recipe: gives augmentation, label smoothing, moving average, gradient accumulation and seed.
      image_size: height and width of the images the model takes, in pixels.
      classes: number of the model's outputs.
      axis: for ``jax.pmap``, the mapped axis over which gradients and metrics are averaged; each device then draws its own
        random numbers. ``None`` under ``jax.jit``, for any number of devices.
      class_weights: float32 ``[classes]``: how much an image of each class counts in the loss; ``None`` for all the same. A
        mixed image counts as its shares.

    Returns:
      ``step(state, batch) -> (state, metrics)``.
    """
    augment = make_augmentation(recipe.augmentation, image_size)

    def step(state: TrainState, batch: Any):
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        dropout, augmentation = jax.random.split(key)
        images, targets = augment(augmentation, batch.images, batch.aspect, batch.labels, classes)
        weights = [] if class_weights is None else [targets @ jnp.asarray(class_weights)]
        targets = optax.smooth_labels(targets, recipe.label_smoothing)

        def gradients(others, key, images, targets, labels, weights=None):
            def loss_of(params):
                logits, new = model.apply(
                    state._replace(params=params, others=others).variables,
                    normalise(images, info),
                    train=True,
                    rngs={"dropout": key},
                    mutable=list(others),
                )
                logits = jnp.asarray(logits, jnp.float32)
                losses = optax.softmax_cross_entropy(logits, targets)
                losses = losses if weights is None else losses * weights
                return losses.mean(), (new, (logits.argmax(-1) == labels).mean())

            (loss, (others, accuracy)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return others, (loss, accuracy, grads)

        others, means = _accumulated(
            gradients, recipe.accumulate, state.others, dropout, images, targets, batch.labels, *weights, average_over=axis
        )
        loss, accuracy, grads = means
        norm = optax.tree.norm(grads)
        sound = jnp.isfinite(norm) & _all_finite(others)
        good = jnp.isfinite(loss) & sound & ~state.diverged

        def updated(state: TrainState, others: Any, grads: Any) -> tuple[TrainState, jax.Array]:
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers, which strict promotion forbids
                updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1 - recipe.ema)
            new = state._replace(params=params, others=others, optimizer=opt_state, ema=ema, step=state.step + 1)
            if recipe.bounded and _has_float32_range(params):
                return new, jnp.ones((), bool)
            finite = _all_finite((params, opt_state, ema))
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state), finite

        def unchanged(state: TrainState, others: Any, grads: Any) -> tuple[TrainState, jax.Array]:
            return state, sound

        def condition(good: jax.Array, *given: Any) -> tuple[TrainState, jax.Array]:
            return jax.lax.cond(good, updated, unchanged, *given)

        def choice(good: jax.Array, *given: Any) -> tuple[TrainState, jax.Array]:
            return jax.tree.map(lambda new, old: jnp.where(good, new, old), updated(*given), unchanged(*given))

        # XLA updates in place under a condition on CPUs and TPUs. On GPUs it may copy the condition's results (for an
        # EfficientFormer it does), and updates in place, an array at a time, where the choice is part of the update.
        new, finite = by_platform(condition, good, state._replace(frozen=None), others, grads, cuda=choice)
        return new._replace(frozen=state.frozen, diverged=~(good & finite)), Metrics(loss, accuracy, norm, finite)

    return step


def placed_step(step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], placement: Placement) -> Any:
    """A training step under ``jax.jit``: the state given is donated, the new one lives where ``placement`` has it."""

    def placed(state: TrainState, batch: Any):
        state, metrics = step(state, batch)
        return jax.lax.with_sharding_constraint(state, placement.of_state(state)), metrics

    return jax.jit(placed, donate_argnums=0)


def _all_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves], jnp.ones((), bool))


def _has_float32_range(tree: Any) -> bool:
    return all(jnp.finfo(leaf.dtype).max >= jnp.finfo(jnp.float32).max for leaf in jax.tree.leaves(tree))


def _accumulated(gradients: Callable, parts: int, others: Any, key: jax.Array, *arrays: jax.Array, average_over: str | None):
    """The other variables after all parts of the arrays, and the means of ``gradients``' results over the parts."""
    if parts == 1:
        others, means = gradients(others, key, *arrays)
    else:

        def add(carry, part):
            others, sums = carry
            others, new = gradients(others, *part)
            return (others, jax.tree.map(jnp.add, sums, new)), None

        # neighbours go to different parts, so that every device has its share of each
        pieces = [array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1) for array in arrays]
        keys = jax.random.split(key, parts)
        shapes = jax.eval_shape(gradients, others, keys[0], *(piece[0] for piece in pieces))[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (others, sums), _ = jax.lax.scan(add, (others, zeros), (keys, *pieces))
        means = jax.tree.map(lambda total: total / parts, sums)
    return (others, means) if average_over is None else jax.lax.pmean((others, means), average_over)


def make_eval_step(model: Any, info: ModelInfo) -> Callable[[Any, Batch], Sums]:
    """Makes the evaluation step ``step(variables, batch) -> sums``, for uint8 images of the model's size."""

    def step(variables: Any, batch: Any) -> Sums:
        logits = model.apply(variables, normalise(batch.images.astype(jnp.float32) / 255, info))
        logits = jnp.asarray(logits, jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = (logits.argmax(-1) == batch.labels) & batch.valid
        return Sums(jnp.sum(correct), jnp.sum(losses, where=batch.valid), jnp.sum(batch.valid))

    return step
