"""``lbpwht models``: which models there are. Counts come from a stored table, so that neither JAX nor Flax is loaded."""

import dataclasses
import fnmatch
import json
from importlib import resources
from typing import Annotated, Any

import tyro
from rich.table import Table

from lbpwht_jax.screen import console, say, show


@dataclasses.dataclass(frozen=True)
class Models:
    """Lists the models: parameters, forward multiply-accumulates, image size, and the layers low-rank backprop adapts."""

    pattern: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATTERN")] = "*"
    """Shell-style pattern the names match in upper or lower case, such as "eff*"."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Prints JSON: what is known of each model, by name."""

    def prepare(self) -> None:
        """Prints the table.

        Raises:
          ValueError: if no name matches.
        """
        found = {name: row for name, row in stored().items() if fnmatch.fnmatchcase(name, self.pattern.lower())}
        if not found:
            raise ValueError(f"no model matches {self.pattern!r}; lbpwht models lists all, and '*name*' finds parts of names")
        if self.json:
            print(json.dumps(found, indent=2))
            return
        table = Table(title="1000 classes; GMACs: forward pass of one image", title_justify="left")
        table.add_column("model", no_wrap=True)
        for title in ("parameters", "GMACs", "pixels", "low-rank layers"):
            table.add_column(title, justify="right")
        for name, row in found.items():
            counts = (f"{row['parameters']:,}", f"{row['macs'] / 1e9:.2f}", str(row["image_size"]))
            table.add_row(name, *counts, str(row["low_rank_layers"]))
        shown = console()
        show(shown, table)
        say(shown, "Low-rank layers, by the regular expression their paths match:")
        for family, layers in sorted({(row["family"], row["pattern"]) for row in found.values()}):
            say(shown, f"  {family}: {layers}")


def stored() -> dict[str, dict[str, Any]]:
    """The table that ``experiments/model_table.py`` wrote: what is known of each model, by name."""
    return json.loads((resources.files("lbpwht_jax") / "bundled" / "models.json").read_text())
