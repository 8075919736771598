"""Where arrays live: the batch is split over all devices, the state is on each of them or split too."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lbpwht_jax.train.state import TrainState

Shard = Literal["data", "params"]


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a run's arrays live.

    Attributes:
      shard: ``"data"``: the batch is split over the devices, and each device has the whole state. ``"params"``: parameters,
        their moving average and the optimiser's state are split too, each along the longest of its axes that the number of
        devices divides. Scalars, arrays without such an axis and running statistics are on every device.
      devices: the devices of all processes; by default all that there are.
    """

    shard: Shard = "data"
    devices: Sequence[Any] = dataclasses.field(default_factory=jax.devices)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return jax.make_mesh((len(self.devices),), ("data",), axis_types=(AxisType.Auto,), devices=self.devices)

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        """The sharding that puts a copy on each device."""
        return NamedSharding(self._mesh, PartitionSpec())

    @functools.cached_property
    def along_batch(self) -> NamedSharding:
        """The sharding that splits the first axis over the devices."""
        return NamedSharding(self._mesh, PartitionSpec("data"))

    def check(self, batch_size: int, parts: int) -> None:
        """Checks that the devices can share a batch equally.

        Args:
          batch_size: images per step, on all devices together.
          parts: in how many parts each step computes its gradients.

        Raises:
          ValueError: if they cannot.
        """
        count = len(self.devices)
        if batch_size % (count * parts):
            what = f"{count} devices" if parts == 1 else f"{count} devices in {parts} parts (accumulate)"
            raise ValueError(
                f"a batch of {batch_size} images cannot be shared equally by {what}; make the batch size a multiple of "
                f"{count * parts}"
            )

    def of_state(self, state: TrainState) -> TrainState:
        """The sharding of each array of a state."""
        replicated = jax.tree.map(lambda _: self.replicated, state)
        if self.shard == "data":
            return replicated
        shared = {name: jax.tree.map(self._longest_axis, getattr(state, name)) for name in _SHARED}
        return replicated._replace(**shared)

    def _longest_axis(self, leaf: Any) -> NamedSharding:
        count = len(self.devices)
        length, axis = max(((n, -i) for i, n in enumerate(leaf.shape) if n % count == 0), default=(0, 0))
        if not length:
            return self.replicated
        return NamedSharding(self._mesh, PartitionSpec(*(None,) * -axis, "data"))

    def abstract(self, state: TrainState) -> TrainState:
        """The shapes, dtypes and shardings of a state, which may itself hold arrays or only shapes."""
        shardings = self.of_state(state)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, shardings)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Puts host arrays, the same in every process, on the devices."""

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            array = np.array(leaf)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, tree, shardings)

    def put_batch(self, batch: Any) -> Any:
        """Puts this process's share of a batch on its devices, as part of the whole batch's arrays."""
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self.along_batch), batch)

    def gather(self, tree: Any) -> Any:
        """Copies a tree of arrays to the host, whole, in every process."""
        return jax.device_get(jax.jit(lambda tree: tree, out_shardings=self.replicated)(tree))


_SHARED = ("params", "frozen", "optimizer", "ema")


def bytes_on_a_device(tree: Any) -> int:
    """The bytes that the arrays of a tree take per device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
