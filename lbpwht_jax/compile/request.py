"""What is to be compiled, and what comes of it: what goes to the child process and back, as JSON."""

import dataclasses
from typing import Any, Literal

from lbpwht_jax.adaptation.presets import Train
from lbpwht_jax.bench.program import DType
from lbpwht_jax.ops.residuals import ResidualsName
from lbpwht_jax.train import Shard


@dataclasses.dataclass(frozen=True)
class Request:
    """One step to compile.

    Attributes:
      model: its name.
      method: its short name, with options at the end as for ``split_method``.
      target: as ``parse_target`` takes it.
      batch_size: images of all chips.
      dtype: of the computation.
      train: what is trained.
      num_classes: outputs of the head.
      when: whether layers that low rank would make slower stay exact.
      shard: what the chips share.
      kernels: whether the dearest kernels are named.
      residuals: what is kept for the backward pass where the method does not say.
    """

    model: str
    method: str
    target: str
    batch_size: int
    dtype: DType = "float32"
    train: Train = "all"
    num_classes: int = 1000
    when: Literal["always", "faster"] = "faster"
    shard: Shard = "data"
    kernels: bool = False
    residuals: ResidualsName = "plain"


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step; bytes, FLOPs, kernels and seconds are those of one chip. ``None`` is what the compiler does not tell.

    Attributes:
      model: its name.
      method: its short name.
      target: the machine.
      batch_size: images of all chips.
      argument_bytes: of the state and the batch.
      output_bytes: of the new state and the metrics.
      alias_bytes: of the outputs that take the place of arguments.
      temp_bytes: of everything else while the step runs.
      code_bytes: of the program itself.
      fits: whether all of it fits the chip's memory; ``None`` where that is not known, as for a CPU.
      largest_batch: images of all chips that fit, where that was asked for.
      moved_bytes: read and written in the chip's memory.
      flops: of products, 2 per multiply-add.
      kernels: that run, for GPUs.
      collective_bytes: of the arrays that chips reduce, gather or scatter together, by kind.
      compute_seconds: the least the products take.
      memory_seconds: the least the moved bytes take.
      link_seconds: the least the collectives take.
      roofline_seconds: for GPUs, what its kernels take at least, one after the other.
      attention: "cudnn", "kernel" (of Pallas) or "plain" (products of XLA's).
      dearest: the ten kernels that take the most, where that was asked for.
      layers: how many of the layers that low rank adapts by default are backpropagated how, as in
        ``lbpwht_jax.adaptation.LayerCounts``.
    """

    model: str
    method: str
    target: str
    batch_size: int
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None
    temp_bytes: int | None = None
    code_bytes: int | None = None
    moved_bytes: int | None = None
    flops: int | None = None
    kernels: int | None = None
    roofline_seconds: float | None = None
    attention: str | None = None
    collective_bytes: dict[str, int] | None = None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    link_seconds: float | None = None
    fits: bool | None = None
    largest_batch: int | None = None
    dearest: list[dict[str, Any]] | None = None
    layers: dict[str, int] | None = None

    @property
    def total_bytes(self) -> int:
        """What the step takes of the memory; what is not known counts as nothing."""
        parts = (self.argument_bytes, self.output_bytes, self.temp_bytes, self.code_bytes)
        return sum(part or 0 for part in parts) - (self.alias_bytes or 0)
