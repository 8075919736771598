"""Where arrays live: the batch along all devices, the state on each of them or shared among them."""

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
      shard: ``"data"``: the batch is shared among the devices and the state is on each. ``"params"``: parameters, their moving
        average and the optimiser's state are shared too, each along the longest of its axes that the number of devices
        divides. Scalars, arrays without such an axis and running statistics are on every device.
      devices: of all processes; by default every one there is.
    """

    shard: Shard = "data"
    devices: Sequence[Any] = dataclasses.field(default_factory=jax.devices)

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return jax.make_mesh((len(self.devices),), ("data",), axis_types=(AxisType.Auto,), devices=self.devices)

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        """A copy on each device."""
        return NamedSharding(self._mesh, PartitionSpec())

    @functools.cached_property
    def along_batch(self) -> NamedSharding:
        """The first axis shared among the devices."""
        return NamedSharding(self._mesh, PartitionSpec("data"))

    def check(self, batch_size: int, parts: int) -> None:
        """Whether the devices can share a batch that is accumulated in ``parts``.

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
        """The shardings of a state's leaves."""
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
        """Shapes, dtypes and shardings of a state, from those or from arrays."""
        shardings = self.of_state(state)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, shardings)

    def put(self, tree: Any, shardings: Any) -> Any:
        """Host arrays, the same in every process, on the devices."""

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            array = np.array(leaf)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, tree, shardings)

    def put_batch(self, batch: Any) -> Any:
        """This process's share of a batch on its devices, part of the whole batch's arrays."""
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self.along_batch), batch)

    def gather(self, tree: Any) -> Any:
        """A tree of arrays on the host, whole, in every process."""
        return jax.device_get(jax.jit(lambda tree: tree, out_shardings=self.replicated)(tree))


_SHARED = ("params", "frozen", "optimizer", "ema")


def bytes_on_a_device(tree: Any) -> int:
    """Bytes that the arrays of a tree take on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
