"""Rules resolved on a model: what is adapted, what is frozen, how much is trained; shown as a table."""

import dataclasses
import functools
import html
from typing import NamedTuple

from lbpwht_jax.adaptation.layer import Adaptation
from lbpwht_jax.adaptation.table import html_table, text_table
from lbpwht_jax.ops.residuals import Residuals

BRANCH = ("lora_a", "lora_b")  # the names of a LoRA branch's parameters


class TrainableParameters(NamedTuple):
    """How many parameters are trained; ``print`` shows it as PEFT does.

    Attributes:
      trainable: number of trained parameters, LoRA's branches among them.
      total: number of all parameters, LoRA's branches among them.
    """

    trainable: int
    total: int

    @property
    def percentage(self) -> float:
        """Trained parameters in percent of all."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percentage:.4f}"


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Rules resolved on a model; ``print`` shows it as a table, and a notebook as a picture of one.

    Attributes:
      adaptations: the layers that ``LowRank`` and ``LoRA`` adapt.
      frozen: paths of the modules whose own parameters are frozen, those under ``LoRA`` among them.
      parameters: pairs of a module's path and the number of its own parameters, without those of branches.
      lean: pairs of the path of a norm, convolution or attention under ``Lean`` and what it keeps.
    """

    adaptations: tuple[Adaptation, ...]
    frozen: frozenset[str]
    parameters: tuple[tuple[str, int], ...]
    lean: tuple[tuple[str, Residuals], ...] = ()

    def trainable(self, path: str) -> bool:
        """Whether the parameter at ``path``, such as ``"blocks_0/mlp/fc1/kernel"``, is trained."""
        module, _, leaf = path.rpartition("/")
        return module not in self.frozen or (leaf in BRANCH and module in self._branch_paths)

    @functools.cached_property
    def branches(self) -> tuple[Adaptation, ...]:
        """The layers with a LoRA branch."""
        return tuple(adaptation for adaptation in self.adaptations if adaptation.rank)

    @functools.cached_property
    def _branch_paths(self) -> frozenset[str]:
        return frozenset(adaptation.layer.path for adaptation in self.branches)

    def trainable_parameters(self) -> TrainableParameters:
        """How many parameters are trained, how many there are, and the percentage."""
        branches = sum(adaptation.branch_parameters for adaptation in self.adaptations)
        trained = sum(own for path, own in self.parameters if path not in self.frozen)
        return TrainableParameters(trained + branches, sum(own for _, own in self.parameters) + branches)

    def __str__(self) -> str:
        return text_table(_COLUMNS, self._rows(), self._total())

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        return html_table(_COLUMNS, self._rows(), self._total()) + f"<p>{html.escape(str(self.trainable_parameters()))}</p>"

    def _rows(self) -> list[tuple[str, ...]]:
        by_path = {adaptation.layer.path: adaptation for adaptation in self.adaptations}
        rows, lean = [], dict(self.lean)
        for path, own in self.parameters:
            adaptation = by_path.get(path)
            trainable = (0 if path in self.frozen else own) + (adaptation.branch_parameters if adaptation else 0)
            if adaptation is None:
                method, grid, rank = "frozen" if path in self.frozen else "full", "", ""
            else:
                method, grid, rank = adaptation.method, "x".join(map(str, adaptation.shown_grid or ())), adaptation.ranks
            method += " + lean" * (lean.pop(path, None) is not None)
            rows.append((path or "(top level)", method, grid, rank, f"{trainable:,}"))
        return rows + [(path, "lean attention", "", "", "0") for path in lean]

    def _total(self) -> tuple[str, ...]:
        return ("total", "", "", "", f"{self.trainable_parameters().trainable:,}")


_COLUMNS = {"path": "<", "method": "<", "grid": ">", "rank": ">", "trainable parameters": ">"}
