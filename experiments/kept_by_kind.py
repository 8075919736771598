"""Bytes kept for the backward pass by what needs them: dense layers, attention, norms, activations and the rest.

    python experiments/kept_by_kind.py

writes results/kept_by_kind.json, which ``experiments/results_page.py`` draws. The backward pass is traced; what is kept counts
for the module that uses it first there, and the slopes that a dense layer uses first for the activation before it.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.extend.core import Literal
from matplotlib.figure import Figure

from lbpwht_jax.adaptation import adapted_model
from lbpwht_jax.cost import abstract_variables
from lbpwht_jax.cost.backward import abstract_pullback
from lbpwht_jax.models import model_info
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "kept_by_kind.json"
MODELS = ("efficientformer_l1", "vit_small_patch16_224", "swinv2_tiny_window8_256")
SETTINGS = (("full", "plain"), ("lp_l1-4", "plain"), ("lp_l1-4", "exact"), ("lp_l1-4", "lean"), ("lp_l1-4", "tiny"))
KINDS = {
    "dense layers": r"(fc\d?|qkv|proj|reduction|head(_dist)?)$",
    "norms and layer scales": r"(norm\d?|ls\d?)$",
    "attention": r"(attn|token_mixer)$",
    "activations": "(?!)",
    "rest": "",
}
CLASSES = 100


def kind_of(kept: Any, equation: Any) -> str:
    """What an array belongs to that an equation of the backward pass is the first to use.

    A dense layer multiplies by the slopes of the activation before it, decodes them, or computes them behind a barrier; it
    contracts what is its own, or decodes it by a step for each row. The norm of a layer that it is joined to has a scope of its
    own there.
    """
    scope = "" if equation is None else str(equation.source_info.name_stack)
    if equation is None or equation.primitive.name == "conv_general_dilated" or "patch_embed/proj" in scope:
        return "rest"
    kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, scope))
    steps = (*kept.aval.shape[:-1], 1)
    codes = jnp.issubdtype(kept.aval.dtype, jnp.unsignedinteger) and all(x.aval.shape != steps for x in equation.invars)
    slopes = equation.primitive.name in ("mul", "optimization_barrier") or codes
    return "activations" if kind == "dense layers" and slopes else kind


def kept_by_kind(name: str, method: str, residuals: Any) -> dict[str, float]:
    """MB per image, by kind, in float32."""
    model, shape = adapted_model(name, method, num_classes=CLASSES, residuals=residuals), model_info(name).images.shape
    pullbacks = [abstract_pullback(model, abstract_variables(model, shape), shape, images) for images in (2, 3)]
    sizes = [[leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(each)] for each in pullbacks]
    backward = jax.make_jaxpr(lambda kept, g: kept(g))(pullbacks[1], jax.ShapeDtypeStruct((), jnp.float32)).jaxpr
    first: dict[Any, Any] = {}
    for equation in backward.eqns:
        for operand in equation.invars:
            if not isinstance(operand, Literal):
                first.setdefault(operand, equation)
    found = dict.fromkeys(KINDS, 0)
    for kept, less, more in zip(backward.invars[:-1], *sizes, strict=True):  # the last input is the loss's cotangent
        found[kind_of(kept, first.get(kept))] += more - less
    return {kind: count / 1e6 for kind, count in found.items()}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws the bytes as stacked bars, a panel per model."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(MODELS))
    for axes, model in zip(panels, MODELS, strict=True):
        own = [row for row in rows if row["model"] == model]
        names = [f"{row['method']}\n{row['residuals']}" for row in own]
        below = [0.0] * len(own)
        for n, kind in enumerate(KINDS):
            heights = [row["mb"][kind] for row in own]
            axes.bar(names, heights, bottom=below, color=f"C{n}", label=kind if axes is panels[0] else None)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        axes.set_title(model, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("MB kept per image")
    figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Counts every setting on every model."""
    rows = [
        {"model": model, "method": method, "residuals": residuals, "mb": kept_by_kind(model, method, residuals)}
        for model in MODELS
        for method, residuals in SETTINGS
    ]
    write_json(RESULTS, {"num_classes": CLASSES, "dtype": "float32", "rows": rows})
    for row in rows:
        print(row["model"], row["method"], row["residuals"], {kind: round(mb, 1) for kind, mb in row["mb"].items()})


if __name__ == "__main__":
    tyro.cli(main)
