"""Training: the recipe, one jitted step, evaluation, and the loop over epochs."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lbpwht_jax.data.arrays import Split, evaluation_batches, training_batches
from lbpwht_jax.models.info import ModelInfo
from lbpwht_jax.partition import join_params, split_params

Augment = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train; the defaults other than epochs, rate and warm-up are the paper's.

    Attributes:
      epochs: passes over the training images.
      batch_size: images a step.
      lr: AdamW's peak learning rate.
      weight_decay: of AdamW.
      clip: global norm that gradients are clipped to.
      warmup_steps: steps over which the rate rises linearly from a thousandth of ``lr``; at most a fifth of all steps.
      min_ratio: what the cosine decays to, over ``lr``.
      label_smoothing: probability spread over all classes.
      seed: of initial head, shuffling and drop path.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 1e-5
    clip: float = 5.0
    warmup_steps: int = 100
    min_ratio: float = 0.01
    label_smoothing: float = 0.1
    seed: int = 0

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipping, then AdamW under linear warm-up and a cosine, over ``steps`` steps."""
        warmup = min(self.warmup_steps, steps // 5)
        schedule = optax.warmup_cosine_decay_schedule(self.lr / 1000, self.lr, warmup, max(steps, 1), self.lr * self.min_ratio)
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adamw(schedule, weight_decay=self.weight_decay))


class TrainState(NamedTuple):
    """What a step reads and writes.

    Attributes:
      params: the parameters trained.
      frozen: the parameters that stay as they are.
      others: the model's other variables.
      optimizer: optimiser state, of ``params`` alone.
      step: the steps done, int32.
    """

    params: Any
    frozen: Any
    others: Any
    optimizer: Any
    step: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """All of the model's variables."""
        return {"params": join_params(self.params, self.frozen), **self.others}


class Step(NamedTuple):
    """What one training step reports: its number from 1, loss, accuracy of the batch in [0, 1], seconds it took."""

    number: int
    loss: float
    accuracy: float
    seconds: float


class Epoch(NamedTuple):
    """What an epoch reports: its number from 1, test accuracy in [0, 1] and test loss."""

    number: int
    test_accuracy: float
    test_loss: float


def normalise(images: jax.Array, info: ModelInfo) -> jax.Array:
    """uint8 images ``[batch, height, width, channels]`` to float32, scaled to [0, 1] and normalised as the model expects."""
    shape = (1, 1, 1, -1)
    mean, std = (jnp.asarray(values, jnp.float32).reshape(shape) for values in (info.mean, info.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def make_train_step(model: Any, info: ModelInfo, optimizer: Any, recipe: Recipe, augment: Augment | None = None) -> Callable:
    """The jitted training step, which computes no gradients of frozen parameters.

    Returns:
      ``step(state, images, labels) -> (state, loss, accuracy)`` for uint8 images and int32 labels; ``state`` is donated.
    """

    def step(state: TrainState, images: jax.Array, labels: jax.Array):
        dropout, augmentation = jax.random.split(jax.random.fold_in(jax.random.key(recipe.seed), state.step))
        if augment is not None:
            images = augment(augmentation, images)

        def loss_of(params):
            logits, others = model.apply(
                state._replace(params=params).variables,
                normalise(images, info),
                train=True,
                rngs={"dropout": dropout},
                mutable=list(state.others),
            )
            logits = jnp.asarray(logits, jnp.float32)
            targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), recipe.label_smoothing)
            return optax.softmax_cross_entropy(logits, targets).mean(), (others, (logits.argmax(-1) == labels).mean())

        (loss, (others, accuracy)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers, which strict promotion forbids
            updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, state.frozen, others, opt_state, state.step + 1), loss, accuracy

    return jax.jit(step, donate_argnums=0)


def make_eval_step(model: Any, info: ModelInfo) -> Callable:
    """The jitted evaluation step.

    Returns:
      ``step(variables, images, labels, real) -> (correct, loss)``, summed over the images where ``real`` is true.
    """

    @jax.jit
    def step(variables, images: jax.Array, labels: jax.Array, real: jax.Array):
        logits = jnp.asarray(model.apply(variables, normalise(images, info)), jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum((logits.argmax(-1) == labels) & real), jnp.sum(losses, where=real)

    return step


def evaluate(step: Callable, variables: Any, split: Split, batch_size: int) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean loss over a split, every image counted once.

    Args:
      step: made by ``make_eval_step``.
      variables: of its model.
      split: the images.
      batch_size: images a call; the last batch is filled up and masked.
    """
    sums = np.zeros(2)
    for batch, real in evaluation_batches(split, batch_size):
        sums += [float(value) for value in step(variables, batch.images, batch.labels, real)]
    correct, loss = sums / len(split)
    return correct, loss


def everything(path: str) -> bool:
    """Trains every parameter."""
    return True


def initialise(variables: Any, optimizer: Any, trainable: Callable[[str], bool] = everything) -> TrainState:
    """The state before the first step, on copies of the variables.

    Args:
      variables: of the model.
      optimizer: of the parameters that are trained.
      trainable: whether the parameter at a path, such as ``"blocks_0/mlp/fc1/kernel"``, is trained.

    Raises:
      ValueError: if nothing is trained.
    """
    params, frozen = split_params(jax.tree.map(jnp.array, variables["params"]), trainable)
    others = {name: jax.tree.map(jnp.array, tree) for name, tree in variables.items() if name != "params"}
    return TrainState(params, frozen, others, optimizer.init(params), jnp.zeros((), jnp.int32))


def fit(
    model: Any,
    info: ModelInfo,
    variables: Any,
    train: Split,
    test: Split,
    recipe: Recipe,
    augment: Augment | None = None,
    trainable: Callable[[str], bool] = everything,
) -> Iterator[Step | Epoch | TrainState]:
    """Trains, reporting as it goes.

    Args:
      model: called as ``model.apply(variables, images, train=...)``: a Linen module, or an adapted one.
      info: how its images are normalised.
      variables: to start from; not changed.
      train: training images.
      test: test images, evaluated after every epoch.
      recipe: how to train.
      augment: ``augment(key, images) -> images``, applied to each batch on the device.
      trainable: whether the parameter at a path is trained, such as ``AdaptedModule.trainable``.

    Yields:
      A ``Step`` after every step, an ``Epoch`` after every epoch, and the last ``TrainState`` at the end.

    Raises:
      ValueError: if there are fewer training images than a batch takes, or nothing is trained.
      FloatingPointError: when the loss is no longer finite, naming the step.
    """
    if len(train) < recipe.batch_size:
        raise ValueError(f"batch size {recipe.batch_size} is larger than the {len(train)} training images; lower it")
    optimizer = recipe.optimizer(recipe.epochs * (len(train) // recipe.batch_size))
    train_step, eval_step = make_train_step(model, info, optimizer, recipe, augment), make_eval_step(model, info)
    state = initialise(variables, optimizer, trainable)
    number = 0
    for epoch in range(1, recipe.epochs + 1):
        for batch in training_batches(train, recipe.batch_size, recipe.seed, epoch):
            started = time.perf_counter()
            state, loss, accuracy = train_step(state, batch.images, batch.labels)
            loss, accuracy = float(loss), float(accuracy)
            number += 1
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; lower the learning rate")
            yield Step(number, loss, accuracy, time.perf_counter() - started)
        test_accuracy, test_loss = evaluate(eval_step, state.variables, test, recipe.batch_size)
        yield Epoch(epoch, test_accuracy, test_loss)
    yield state
