"""Runs Tables 5, 6 and 7 of the LBP-WHT paper (arXiv 2309.15275) by its recipe, where data and weights are available.

    python experiments/paper_tables.py 5 --data ~/tensorflow_datasets --weights ~/weights
    python experiments/paper_tables.py 7 --data ~/tensorflow_datasets --hub --dtype bfloat16

Data are TFDS data sets that ``lbpwht prepare`` prepared in the folder, or ``NAME.zip`` or ``NAME/`` in it with images as
``{train,test}/CLASS/IMAGE``. Weights are ``MODEL.safetensors`` in the folder, in any layout that ``load_pretrained`` reads, or
come from the Hugging Face hub with ``--hub``. What is missing is listed, with how to get it, and the rest is run. Every run is
``lbpwht finetune --recipe paper`` in a folder of its own; finished runs are left as they are and interrupted ones resumed.
Results go to experiments/results/paper_table_N.json, a row for each finished run of the table. Costs are counted by
``experiments/cost_tables.py``; Table 8, latency, by ``lbpwht bench layers``.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from cost_tables import L1, L7, S0, SWIN, TABLE_5, TABLE_7, L
from results_accuracy import paper_table
from transfer import write_results

from lbpwht_jax.adaptation import Train
from lbpwht_jax.cli import main as lbpwht
from lbpwht_jax.data import open_dataset

RESULTS = Path(__file__).parent / "results"
HUB = {
    L1: "timm/efficientformer_l1.snap_dist_in1k",
    L7: "timm/efficientformer_l7.snap_dist_in1k",
    S0: "timm/efficientformerv2_s0.snap_dist_in1k",
    L: "timm/efficientformerv2_l.snap_dist_in1k",
    SWIN: "timm/swinv2_small_window8_256.ms_in1k",
}
SIX = ("cifar100", "cifar10", "cars196", "oxford_flowers102", "food101", "oxford_iiit_pet")


class Run(NamedTuple):
    """One run of a table."""

    model: str
    dataset: str
    method: str
    train: Train

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join(self)


def table_runs(table: str) -> list[Run]:
    """The runs of a table, data set by data set."""
    if table == "5":
        return [Run(row.model, dataset, row.method, row.train) for dataset in SIX for row in TABLE_5]
    if table == "7":
        return [Run(row.model, "places365_small", row.method, row.train) for row in TABLE_7]
    methods = ("full", "lora_all-8", *(f"lp_l1-{r}+lora_all-8" for r in (2, 4, 8)))
    return [Run(L1, dataset, method, "last_stage") for dataset in ("cifar100", "cifar10") for method in methods]


def find_data(dataset: str, data: Path) -> tuple[str | None, str]:
    """How ``lbpwht finetune`` would be told of a data set, or None, and what to do about it."""
    for path in (data / f"{dataset}.zip", data / dataset):
        if path.is_file() or (path / "train").is_dir():
            return f"folder:{path}", ""
    try:
        return open_dataset(f"tfds:{dataset}", data_dir=data).name, ""
    except (ValueError, FileNotFoundError) as error:
        return None, f"data set {dataset}: {error}"


def find_weights(model: str, weights: Path | None, hub: bool) -> tuple[str | None, str]:
    """Where a model's weights are, or None, and what to do about it."""
    file = weights / f"{model}.safetensors" if weights else None
    if file and file.exists():
        return str(file), ""
    if hub:
        return HUB[model], ""
    return (
        None,
        f"weights of {model}: no {file or '--weights folder'}; get {HUB[model]}, or name --hub where there is a network",
    )


def row(run: Run, folder: Path) -> dict[str, Any]:
    """The settings and results of a finished run."""
    config, result = (json.loads((folder / name).read_text()) for name in ("config.json", "result.json"))
    return {**run._asdict(), **{key: config[key] for key in ("dtype", "recipe", "versions", "device")}, **result}


def main(
    number: Annotated[Literal["5", "6", "7"], tyro.conf.Positional],
    data: Path,
    weights: Path | None = None,
    hub: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    epochs: int = 50,
    runs: Path = Path("runs/paper"),
    models: tuple[str, ...] = tuple(HUB),
    datasets: tuple[str, ...] = (*SIX, "places365_small"),
    limit: int | None = None,
    output: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Runs a table.

    Args:
      number: number of the table in the paper.
      data: folder of the data sets.
      weights: folder of the pretrained weights.
      hub: takes weights that are not in the folder from the Hugging Face hub.
      dtype: dtype of the computation.
      epochs: the paper's 50, or fewer for a trial.
      runs: folder for the run folders.
      models: takes only these.
      datasets: takes only these.
      limit: stops after this many runs.
      output: JSON file for all finished runs, including those of earlier calls; experiments/results/paper_table_N.json by
        default.
      dry_run: says what is missing and what would be run, but runs and writes nothing.
    """
    folder_of = {run: runs / f"table_{number}" / f"{run.name}-{dtype}-{epochs}" for run in table_runs(number)}
    chosen = [run for run in folder_of if run.model in models and run.dataset in datasets]
    found_data = {run.dataset: find_data(run.dataset, data) for run in chosen}
    found_weights = {run.model: find_weights(run.model, weights, hub) for run in chosen}
    missing = [why for _, why in (*found_data.values(), *found_weights.values()) if why]
    ready = [run for run in chosen if found_data[run.dataset][0] and found_weights[run.model][0]]
    print(f"Table {number}: {len(ready)} of {len(chosen)} runs have what they need.")
    for why in missing:
        print(f"missing: {why}")
    output, failed = output or RESULTS / f"paper_table_{number}.json", 0
    for run in ready[:limit]:
        folder = folder_of[run]
        arguments = ["--output", str(folder), "--model", run.model, "--pretrained", str(found_weights[run.model][0])]
        arguments += ["--dataset", str(found_data[run.dataset][0]), "--data-dir", str(data), "--recipe", "paper"]
        arguments += ["--method", run.method, "--train", run.train, "--dtype", dtype, "--epochs", str(epochs)]
        if (folder / "config.json").exists():
            arguments = ["--resume", str(folder), "--data-dir", str(data)]
        finished = (folder / "result.json").exists()
        if not finished:
            print(f"lbpwht finetune {' '.join(arguments)}", flush=True)
        if dry_run:
            continue
        if not finished:
            failed += lbpwht(["finetune", *arguments]) != 0
            jax.clear_caches()
        rows = [row(done, path) for done, path in folder_of.items() if (path / "result.json").exists()]
        if rows:
            measured = {"command": f"python experiments/paper_tables.py {number}", "rows": rows}
            write_results(output, measured)
            print(paper_table(measured))
    if failed or (missing and not ready):
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
