"""What training runs are judged by."""

import dataclasses
from collections.abc import Sequence

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run is judged by.

    Attributes:
      method: the method's short name.
      test_accuracy: accuracy after the last epoch, in [0, 1].
      trainable_parameters: how many scalars were trained.
      backward_flops: FLOPs of the backward pass's matrix products, per image.
      saved_bytes: bytes kept for the backward pass, per image.
      step_seconds: median over the run without its first step, which is slower; compiling counts in no step. ``None`` if the
        run's times are lost.
    """

    method: str
    test_accuracy: float
    trainable_parameters: int
    backward_flops: int
    saved_bytes: int
    step_seconds: float | None


def table(results: Sequence[Result]) -> Table:
    """Shows runs side by side."""
    table = Table(title="What it came to; FLOPs and bytes kept are per image", title_justify="left")
    table.add_column("method")
    for heading in ("test accuracy", "trained parameters", "backward MFLOPs", "MB kept", "median step, ms"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.method,
            f"{result.test_accuracy:.2%}",
            f"{result.trainable_parameters:,}",
            f"{result.backward_flops / 1e6:.1f}",
            f"{result.saved_bytes / 1e6:,.2f}",
            "lost" if result.step_seconds is None else f"{result.step_seconds * 1e3:,.0f}",
        )
    return table
