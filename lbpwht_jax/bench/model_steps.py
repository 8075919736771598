"""Times of whole training steps of one model: forward pass, backward pass, clipping, AdamW."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lbpwht_jax.adaptation import AdaptedModule, LayerCounts, Train, default_train, layer_counts
from lbpwht_jax.bench.program import DType, measured_model, split_method, step_program
from lbpwht_jax.bench.timing import interleaved
from lbpwht_jax.cost import backward_flops, residual_bytes
from lbpwht_jax.data import Batch
from lbpwht_jax.models import model_info
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.train import Placement, TrainState, initial_state

CLASSES = 100


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One method on one model.

    Attributes:
      model: the model's name.
      method: the method's short name, with options at the end as for ``split_method``.
      train: what is trained.
      batch: images per step.
      seconds: time of a step: forward pass, backward pass and optimiser.
      images_per_second: images trained on per second.
      speedup: the first method's ``seconds`` over this one's.
      backward_flops: FLOPs of the backward pass's matrix products, per image.
      saved_bytes: bytes kept for the backward pass, per image.
      peak_bytes: most device memory that the compiler plans to use; ``None`` if the backend does not report it.
    """

    model: str
    method: str
    train: str
    batch: int
    seconds: float
    images_per_second: float
    speedup: float
    backward_flops: int
    saved_bytes: int
    peak_bytes: int | None


class PreparedStep:
    """A compiled training step that always gets the same batch.

    Attributes:
      backward_flops, saved_bytes, peak_bytes: as in ``StepRow``.
    """

    def __init__(self, compiled: Any, state: TrainState, batch: Batch, counts: tuple[int, int]):
        self._compiled, self._state, self._batch = compiled, state, batch
        self._first: Any = None
        self.backward_flops, self.saved_bytes = counts
        self.peak_bytes = _planned_peak(compiled)

    def run(self) -> Any:
        """Makes the next step and returns its metrics, which may still be on their way."""
        self._state, metrics = self._compiled(self._state, self._batch)
        if self._first is None:
            self._first = metrics
        return metrics

    @property
    def text(self) -> str:
        """The compiled program."""
        return self._compiled.as_text()

    @property
    def loss(self) -> float:
        """The loss of the first step, which is made if it has not been."""
        first = self.run() if self._first is None else self._first
        return float(first.loss)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSteps:
    """The training steps of one model under any method, from the same parameters and on the same random images.

    Batch normalisation uses its running statistics, and the head has 100 classes.

    Attributes:
      model: its name.
      train: what is trained; ``None`` for each method's default, as ``default_train`` has it.
      batch_size: images per step.
      dtype: dtype of the computation; parameters and the optimiser's state are float32.
      when: whether layers that low rank would make slower stay exact, as in ``LowRankSpec``.
      residuals: what is kept for the backward pass where a method does not say, as in ``create_model``.
    """

    model: str
    train: Train | None = "all"
    batch_size: int = 16
    dtype: DType = "float32"
    when: Literal["always", "faster"] = "faster"
    residuals: ResidualsName = "plain"

    def trained(self, method: str) -> Train:
        """What is trained under a method."""
        return self.train or default_train(split_method(method)[0])

    def counts(self, method: str) -> LayerCounts:
        """How the model's layers are backpropagated under a method."""
        return layer_counts(model_info(self.model), self.adapted(method))

    def adapted(self, method: str) -> AdaptedModule:
        """The model under a method's rules.

        Args:
          method: its short name, with options at the end as for ``split_method``.

        Raises:
          ValueError: if the model or the method is unknown.
        """
        return measured_model(self.model, method, self.trained(method), CLASSES, self.dtype, self.when, self.residuals)

    def prepare(self, method: str) -> PreparedStep:
        """Compiles a method's step.

        Raises:
          ValueError: if the model or the method is unknown.
          jax.errors.JaxRuntimeError: if the device's memory does not suffice.
        """
        model = self.adapted(method)
        program = step_program(self.model, model, self.batch_size, CLASSES, Placement(devices=jax.devices()[:1]))
        own = model.with_branches(jax.random.key(1), self._variables)
        state = initial_state(own, program.optimizer, model.trainable)
        compiled = program.step.lower(state, self._batch).compile()
        counts = backward_flops(model, own, self._image), residual_bytes(model, own, self._image)
        return PreparedStep(compiled, state, self._batch, counts)

    @functools.cached_property
    def _module(self) -> Any:
        return self.adapted("full").module

    @functools.cached_property
    def _image(self) -> tuple[int, int, int]:
        return (self._module.image_size, self._module.image_size, model_info(self.model).images.channels)

    @functools.cached_property
    def _variables(self) -> Any:
        """On the host, so that the device holds no more than the states of the steps."""
        return jax.device_get(jax.jit(self._module.init)(jax.random.key(0), jnp.zeros((1, *self._image))))

    @functools.cached_property
    def _batch(self) -> Batch:
        rng = np.random.default_rng(0)
        images: Any = jnp.asarray(rng.integers(0, 256, (self.batch_size, *self._image), dtype=np.uint8))
        labels: Any = jnp.asarray(rng.integers(0, CLASSES, self.batch_size).astype(np.int32))
        valid: Any = jnp.ones(self.batch_size, bool)
        aspect: Any = jnp.ones(self.batch_size, jnp.float32)
        return Batch(images, labels, valid, aspect)

    def rows(self, steps: Mapping[str, PreparedStep], rounds: int) -> list[StepRow]:
        """Times steps in turn.

        Args:
          steps: by their methods; all are compared with the first.
          rounds: number of samples of each time; the median counts.

        Raises:
          ValueError: if a first loss is not the first method's; nothing is timed then.
        """
        first = next(iter(steps))
        for method, step in steps.items():
            if not abs(step.loss - steps[first].loss) <= _tolerance(self.dtype) * abs(steps[first].loss):
                raise ValueError(
                    f"{self.model}: the first loss of {method} is {step.loss}, that of {first} {steps[first].loss}; nothing "
                    "was timed"
                )
        seconds = interleaved({method: step.run for method, step in steps.items()}, rounds)
        rows = []
        for method, step in steps.items():
            times = (seconds[method], self.batch_size / seconds[method], seconds[first] / seconds[method])
            counts = (step.backward_flops, step.saved_bytes, step.peak_bytes)
            rows.append(StepRow(self.model, method, self.trained(method), self.batch_size, *times, *counts))
        return rows


def _tolerance(dtype: DType) -> float:
    """The forward pass is exact, so that losses before the first step differ by rounding alone.

    By default accelerators round the operands of float32 products, to TF32 or to bfloat16.
    """
    if dtype == "bfloat16":
        return 3e-2
    return 1e-4 if jax.default_backend() == "cpu" else 1e-2


def _planned_peak(compiled: Any) -> int | None:
    """Bytes; on a CPU the compiler's number says little and is left out."""
    if jax.default_backend() == "cpu":
        return None
    return getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0) or None
