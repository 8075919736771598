"""The command ``lbpwht bench``."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import tyro

from lbpwht_jax.bench.layers import Layers
from lbpwht_jax.bench.step import Step
from lbpwht_jax.cli.help import description

_MARGIN = 18  # what a box and the names in it take in the list of benches


@dataclasses.dataclass(frozen=True)
class Bench:
    """Times low-rank backpropagation against exact backpropagation on this machine."""

    what: tyro.conf.OmitArgPrefixes[
        Annotated[Layers, tyro.conf.subcommand("layers", prefix_name=False, description=description(Layers, _MARGIN))]
        | Annotated[Step, tyro.conf.subcommand("step", prefix_name=False, description=description(Step, _MARGIN))]
    ]

    def prepare(self) -> Callable[[], None]:
        """Checks the arguments of the bench that was chosen; returns and raises what it does."""
        return self.what.prepare()
