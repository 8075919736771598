"""The cost tables of the LBP-WHT paper (arXiv 2309.15275) beside this library's count, and backward FLOPs against rank.

    python experiments/cost_tables.py

reproduces results/cost_tables.json and results/cost_by_rank.png, and prints the tables as Markdown. Everything is counted on
shapes: no weights, no accelerator.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from lbpwht_jax import Freeze, LowRankSpec, adapt, create_model, list_models, lp_l1
from lbpwht_jax.adaptation.linen import AdaptedModule
from lbpwht_jax.adaptation.presets import Train, adapted_model, parse_method
from lbpwht_jax.cost.backward import abstract_variables
from lbpwht_jax.cost.paper import paper_flops
from lbpwht_jax.cost.trace import Product, Record, layer_records
from lbpwht_jax.models import model_info

RESULTS = Path(__file__).parent / "results"

L1, L7 = "efficientformer_l1", "efficientformer_l7"
S0, L, SWIN = "efficientformerv2_s0", "efficientformerv2_l", "swinv2_small_window8_256"
SWIN_LAYERS = r"attn/proj$|mlp/fc[12]$|downsample/reduction$"
SWIN_FROZEN = r"attn/qkv$"
DENSE_QKV = "qkv runs dense: the authors' forward pass goes past their qkv layer"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of Table 5 or 7.

    Attributes:
      model: the model's name in this library.
      label: the method's name in the paper.
      mflops: MFLOPs per image, in the paper.
      method: the method's name for ``lbpwht cost``.
      train: what is trained.
      layers: regular expression of the adapted layers, if it is not the family's default.
      frozen: regular expression of modules that are frozen in addition to those that ``train`` freezes.
      quirk: what is peculiar to the authors' setting.
    """

    model: str
    label: str
    mflops: float
    method: str
    train: Train = "all"
    layers: str | None = None
    frozen: str | None = None
    quirk: str = ""


def _rows(model: str, full: float, lora_all: float, low_rank: dict[int, float], **fields) -> list[Row]:
    layers = fields.get("layers")
    rows = [Row(model, "Full BP", full, "full")]
    rows += [Row(model, "LoRA-all", lora_all, "lora_all-8", quirk="all but the adapted kernels and biases is trained")]
    return rows + [Row(model, f"LP_L1-{r}", value, f"lp_l1-{r}", layers=layers) for r, value in low_rank.items()]


def _swin() -> list[Row]:
    adapted: dict[str, Any] = {"layers": SWIN_LAYERS}
    low_rank = {4: 19341.06, 6: 25894.42, 8: 34860.07}
    frozen = f"LoRA on all layers but qkv, the rest frozen; {DENSE_QKV}"
    others = f"LoRA on all layers but qkv, which is frozen; the rest is trained; {DENSE_QKV}"
    return [
        Row(SWIN, "Full BP", 48318.40, "full"),
        Row(SWIN, "LoRA", 27202.90, "lora_all-8", "head", **adapted, quirk=frozen),
        Row(SWIN, "LoRA-all", 27929.60, "lora_all-8", **adapted, frozen=SWIN_FROZEN, quirk=others),
        *(Row(SWIN, f"LP_L1-{r}", value, f"lp_l1-{r}", **adapted, quirk=DENSE_QKV) for r, value in low_rank.items()),
    ]


TABLE_5 = (
    *_rows(L1, 5841.09, 4019.08, {4: 2150.55, 6: 3371.43, 7: 4147.60, 8: 5036.63}),
    *_rows(L7, 43128.48, 26222.33, {4: 12656.41, 6: 22172.82, 8: 35147.13}),
    *_rows(S0, 2259.93, 1899.99, {4: 1186.67, 6: 1577.43, 7: 1833.31, 8: 2116.41}),
    *_rows(L, 12614.40, 8896.07, {4: 4981.08, 6: 7575.79, 8: 11114.21}),
    *_swin(),
)
TABLE_7 = (
    Row(L1, "Full BP", 1685.01, "full", "last_stage"),
    Row(L1, "LoRA", 242.61, "lora-8", "head", quirk="branches of the attention block and the head alone are trained"),
    Row(L1, "LoRA-all", 976.50, "lora_all-8", "last_stage", quirk="all but the adapted kernels and biases is trained"),
    *(
        Row(L1, f"LP_L1-{r}", value, f"lp_l1-{r}", "last_stage")
        for r, value in {2: 233.62, 4: 480.00, 6: 820.11, 8: 1397.02}.items()
    ),
)
CLASSES = {"5": 100, "7": 365}
# The families of the paper, and plain vision transformers.
CURVES = (
    *("deit_*", "efficientformer*", "swinv2_*", "vit_base_patch16_224", "vit_base_patch32_224", "vit_large_patch16_224"),
    *("vit_micro_patch4_28", "vit_small_patch16_224", "vit_tiny_patch16_224"),
)

# Table 6: GFLOPs, MB of activations, MB of gradients, at batch 64.
TABLE_6 = {
    "Full BP": (121, 141, 2352),
    "LoRA-all": (62, 142, 44),
    "LP_L1-2 + LoRA-all": (4, 9, 44),
    "LP_L1-4 + LoRA-all": (13, 29, 44),
    "LP_L1-8 + LoRA-all": (48, 104, 44),
}
TABLE_6_QUIRKS = (
    "qkv counts once for each of the four blocks, one of which has attention; proj and LoRA's attention branches count once",
    "LoRA's branches of query, key and value are apart, of rank 8 each",
    "kernel gradients are multiplied by the batch of 64",
    "MB are 2^20 bytes; biases, attention products and element-wise work are left out",
    "low-rank rows keep R of the 49 tokens, and add 49 R sums a channel of inputs and outputs to project them (our reading)",
)


def image_shape(model: str) -> tuple[int, int, int]:
    """Height, width and channels of the model's usual images."""
    return model_info(model).images.shape


@functools.cache
def plain_records(model: str, train: Train, classes: int) -> tuple[Record, ...]:
    """Records of a model without branches, whatever is low-rank."""
    return tuple(_trace(adapted_model(model, "full", train, classes), model))


def _trace(adapted: AdaptedModule, model: str) -> list[Record]:
    shape = image_shape(model)
    return layer_records(adapted, abstract_variables(adapted, shape), shape, adapted.trainable)


@functools.cache
def row_records(row: Row, classes: int) -> tuple[tuple[Record, LowRankSpec | None], ...]:
    """What a row counts: records of one image's forward pass, each with the spec of its backward pass."""
    info = model_info(row.model)
    if row.layers is not None:
        info = dataclasses.replace(info, layers=dataclasses.replace(info.layers, low_rank=row.layers))
    method = parse_method(row.method)
    if method.branches == "none":
        records, adapted = plain_records(row.model, row.train, classes), re.compile(info.layers.low_rank)
        return tuple((record, method.spec if adapted.search(record.path) else None) for record in records)
    rules = method.rules(info, row.train)
    if row.frozen is not None:
        rules = (Freeze(row.frozen), *rules)
    module = create_model(row.model, num_classes=classes, frozen_batch_norm=True)
    model = adapt(module, rules, jax.ShapeDtypeStruct((1, *image_shape(row.model)), jnp.float32))
    return tuple((record, model.spec(record.path)) for record in _trace(model, row.model))


def row_mflops(row: Row, classes: int) -> float:
    """Our count of a row, per image."""
    return sum(paper_flops(record, spec) for record, spec in row_records(row, classes)) / 1e6


def compare(table: tuple[Row, ...], classes: int) -> list[dict]:
    """Rows with both counts, and both speed-ups over the full backpropagation above them, and the relative differences."""
    compared, full = [], (0.0, 0.0)
    for row in table:
        ours = row_mflops(row, classes)
        if row.method == "full":
            full = (row.mflops, ours)
        speedups = full[0] / row.mflops, full[1] / ours
        compared.append(
            {
                "model": row.model,
                "row": row.label,
                "method": row.method,
                "train": row.train,
                "paper_mflops": row.mflops,
                "our_mflops": ours,
                "difference": ours / row.mflops - 1,
                "paper_speedup": speedups[0],
                "our_speedup": speedups[1],
                "speedup_difference": speedups[1] / speedups[0] - 1,
                "quirk": row.quirk,
            }
        )
    return compared


def table_6() -> dict[str, tuple[float, float, float]]:
    """GFLOPs, MB of activations and MB of gradients of the last stage of EfficientFormer-L1 at batch 64, unrounded."""
    batch, rank, mega = 64, 8, 2**20
    records = plain_records(L1, "last_stage", CLASSES["7"])
    layers = [r for r in records if isinstance(r, Product) and r.grid is not None and r.path.startswith("stages_3/")]
    inputs = outputs = parameters = 0
    branches: list[tuple[int, int]] = []
    for layer in layers:
        fused, (x, y) = layer.path.endswith("/qkv"), layer.channels
        times = 4 if fused else 1
        inputs, outputs, parameters = inputs + times * x, outputs + times * y, parameters + times * x * y
        # queries and keys have a sixth of qkv's channels each, values the rest
        branches += [(x, y // 6), (x, y // 6), (x, 4 * y // 6)] if fused else [(x, y)]
    lora = rank * sum(map(sum, branches))
    tokens, channels = layers[0].tokens, inputs + rank * len(branches)
    table = {
        "Full BP": (4 * tokens * parameters * batch / 1e9, 4 * tokens * inputs * batch / mega, 4 * parameters * batch / mega)
    }
    for label in list(TABLE_6)[1:]:
        kept, projection = tokens, 0
        if label.startswith("LP"):
            kept = lp_l1(int(label.split()[0].rpartition("-")[2])).rank
            projection = tokens * kept * (inputs + outputs)
        flops = batch * (2 * kept * (parameters + lora) + projection)
        table[label] = (flops / 1e9, 4 * kept * channels * batch / mega, 4 * lora * batch / mega)
    return table


def by_rank(model: str) -> dict:
    """Backward MFLOPs of a model at 100 classes: of full backpropagation, and by the number of functions kept."""
    records = plain_records(model, "all", 100)
    adapted = re.compile(model_info(model).layers.low_rank)
    curve = []
    for r in range(1, 16):
        spec = lp_l1(r)
        flops = sum(paper_flops(record, spec if adapted.search(record.path) else None) for record in records)
        curve.append((spec.rank, flops / 1e6))
    return {"full": sum(paper_flops(record) for record in records) / 1e6, "lp_l1": curve}


def plot(curves: dict[str, dict], path: Path) -> None:
    """Draws each family's curves in a panel, full backpropagation as a dashed line."""
    families: dict[str, list[str]] = {}
    for model in curves:
        families.setdefault(model_info(model).module.__name__, []).append(model)
    figure, panels = plt.subplots(2, 2, figsize=(16, 9), sharex=True, layout="constrained")
    for axes, (family, models) in zip(panels.flat, sorted(families.items()), strict=True):
        for model in sorted(models, key=lambda model: curves[model]["full"], reverse=True):
            (line,) = axes.plot(*zip(*curves[model]["lp_l1"], strict=True), marker=".", label=model)
            axes.axhline(curves[model]["full"], linestyle="--", linewidth=0.8, color=line.get_color())
        axes.set(title=family, yscale="log", ylabel="backward MFLOPs an image, as the paper counts")
        axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("functions kept of 64 (LP_L1); dashed: full backpropagation")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def markdown(tables: dict[str, list[dict]], sixth: dict[str, tuple[float, float, float]]) -> str:
    """All tables, the paper's figures beside ours."""
    lines = []
    for number, rows in tables.items():
        lines += [f"Table {number} ({CLASSES[number]} classes)", ""]
        lines += [
            "| model | method | MFLOPs: paper | ours | | speed-up: paper | ours | | quirk |",
            "|---|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        for row in rows:
            lines.append(
                f"| {row['model']} | {row['row']} | {row['paper_mflops']:.2f} | {row['our_mflops']:.2f} "
                f"| {row['difference']:+.1%} | {row['paper_speedup']:.2f} | {row['our_speedup']:.2f} "
                f"| {row['speedup_difference']:+.1%} | {row['quirk']} |"
            )
        lines.append("")
    lines += ["Table 6 (last stage of EfficientFormer-L1, batch 64), paper / ours", ""]
    lines += ["| method | GFLOPs | activations, MB | gradients, MB |", "|---|--:|--:|--:|"]
    for label, ours in sixth.items():
        cells = (f"{paper} / {own:.2f}" for paper, own in zip(TABLE_6[label], ours, strict=True))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", *(f"- {quirk}" for quirk in TABLE_6_QUIRKS)]
    return "\n".join(lines)


def main(output: Path = RESULTS, limit: float = 0.08) -> None:
    """Counts every row, prints the tables, and writes cost_tables.json and cost_by_rank.png.

    Args:
      output: the folder to write to.
      limit: relative difference beyond which a row is named as a miss.
    """
    tables = {number: compare(rows, CLASSES[number]) for number, rows in (("5", TABLE_5), ("7", TABLE_7))}
    sixth, curves = table_6(), {model: by_rank(model) for pattern in CURVES for model in list_models(pattern)}
    rows = [row for table in tables.values() for row in table]
    differences = [row["difference"] for row in rows]
    worst = max(map(abs, differences))
    rms = (sum(d * d for d in differences) / len(differences)) ** 0.5
    results = {
        "command": "python experiments/cost_tables.py",
        "table_5": tables["5"],
        "table_7": tables["7"],
        "rms_difference": rms,
        "worst_difference": worst,
        "worst_speedup_difference": max(abs(row["speedup_difference"]) for row in rows),
        "table_6": {label: {"paper": TABLE_6[label], "ours": ours} for label, ours in sixth.items()},
        "table_6_quirks": TABLE_6_QUIRKS,
        "mflops_by_rank": curves,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "cost_tables.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(curves, output / "cost_by_rank.png")
    print(markdown(tables, sixth))
    print(
        f"\n{len(rows)} rows: {rms:.1%} rms, {worst:.1%} at worst, speed-ups {results['worst_speedup_difference']:.1%} at worst"
    )
    misses = [f"{r['model']} {r['row']}" for r in rows if max(abs(r["difference"]), abs(r["speedup_difference"])) > limit]
    print(f"beyond {limit:.0%}: {', '.join(misses) or 'none'}")


if __name__ == "__main__":
    tyro.cli(main)
