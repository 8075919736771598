"""Adapts the pretrained backbone to CIFAR-10 by every method, with several seeds: the paper's claims at a small scale.

    python experiments/transfer.py --data cifar10.zip

appends every run to experiments/results/transfer.json and skips those already there, so that it can be stopped and called
again. ``--processes 2`` runs two at a time, each on half of the cores; for a model this small that is faster than one on all.
``experiments/transfer_steps.py`` times the steps, and ``experiments/results_page.py`` makes the tables, claims and plots.
The images lie as ``.../{train,test}/CLASS/IMAGE`` in a zip file or folder; the weights are those of
``experiments/transfer_backbone.py``.

Runs of one seed share their new head, their order of images and the draws of augmentation. All methods have the same learning
rate, as in the paper. Of 5e-4, 1e-3, 2e-3 and 4e-3 it is the one at which full backpropagation did best, with a seed outside
the sweep (``--methods full --seeds 100 --setting.lr ...``, written to other files). LoRA also runs at four times that rate,
because it often needs a higher one. LoRA without low rank is trained in a third way too, as PEFT does and the command line
unless told: its branches and the head alone (``head``).
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import tyro
from transfer_backbone import NAME, WEIGHTS, backbone_info
from transfer_images import read_dataset
from transfer_plans import planned_backbone
from transfer_training import make_trainer, train
from transfer_variants import VARIANTS, Setting, Train, Variant, adapted_backbone, pretrained

from lbpwht_jax.cost import backward_flops, layer_costs, residual_bytes
from lbpwht_jax.data import Dataset
from lbpwht_jax.weights import load_weights

RESULTS = Path(__file__).parent / "results" / "transfer.json"
Task = tuple[Variant, Train, int]
SETTING = Setting()


def run(variant: Variant, trained: Train, seed: int, setting: Setting, weights: Path, dataset: Dataset) -> dict:
    """Trains and evaluates once.

    Returns:
      Settings and results of the run: accuracies in [0, 1], costs per image, times in seconds.
    """
    started = time.perf_counter()
    info, classes = backbone_info(), len(dataset.classes)
    start = pretrained(weights, classes, seed)
    if variant.flops_of:
        model = planned_backbone(variant, trained, start, dataset, seed)
    else:
        model = adapted_backbone(variant, trained, classes)
    variables = model.with_branches(jax.random.fold_in(jax.random.key(seed), 1), start)
    trainer = make_trainer(model, info, dataset, setting.recipe(seed, variant.lr_scale), model.trainable)
    losses = []
    for _, loss, state in train(trainer, variables):  # noqa: B007, the last state is used below
        losses.append(loss)
    accuracy = trainer.evaluator(state.variables, dataset.test).accuracy
    shape = info.images.shape
    return {
        "variant": variant.name,
        **dataclasses.asdict(variant),
        "train": trained,
        "seed": seed,
        "test_accuracy": accuracy,
        "last_losses": statistics.mean(losses[-20:]),
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "backward_flops": backward_flops(model, variables, shape),
        "backward_flops_paper": sum(layer.backward_flops_paper for layer in layer_costs(model, variables, shape)),
        "saved_bytes": residual_bytes(model, variables, shape),
        "run_seconds": time.perf_counter() - started,
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}, {cores()}",
    }


def usable_cores() -> list[int]:
    """The cores that this process may run on; all of them on macOS and Windows, which do not confine processes."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores() -> str:
    """The number of cores that this process may run on, in words."""
    number = len(usable_cores())
    return "1 core" if number == 1 else f"{number} cores"


@functools.cache
def sweep_images(data: Path, setting: Setting, cache: Path | None) -> Dataset:
    """The images, read once per process; the arguments are those of ``main``."""
    return read_dataset([data], backbone_info().images.size, setting.train_per_class, setting.test_per_class, cache)


def run_task(task: Task, setting: Setting, weights: Path, data: Path, cache: Path | None) -> dict:
    """Calls ``run`` in whichever process, and leaves no compiled function behind."""
    try:
        return run(*task, setting, weights, sweep_images(data, setting, cache))
    finally:
        jax.clear_caches()


def _take_cores(shares: Any) -> None:
    """Confines this process to cores that no other has taken. JAX starts later and makes as many threads."""
    os.sched_setaffinity(0, shares.get())


def run_all(tasks: Sequence[Task], processes: int, *arguments: Any) -> Iterator[dict]:
    """Runs every task, in this process or in several at a time, each on its share of the cores.

    Args:
      tasks: the runs.
      processes: number of runs at a time.
      *arguments: those of ``run_task``, after the task.

    Yields:
      The result of each run as it ends.

    Raises:
      SystemExit: if there are more processes than cores, or the system cannot share these out.
    """
    if processes == 1:
        yield from (run_task(task, *arguments) for task in tasks)
        return
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("--processes needs Linux, where a process can be confined to some of the cores; leave it out")
    usable = usable_cores()
    if not 1 < processes <= len(usable):
        raise SystemExit(f"--processes must be between 1 and the {len(usable)} cores, got {processes}")
    context = multiprocessing.get_context("spawn")
    shares = context.Queue()
    for first in range(processes):
        shares.put(set(usable[first::processes]))
    with concurrent.futures.ProcessPoolExecutor(processes, context, _take_cores, (shares,)) as pool:
        futures = [pool.submit(run_task, task, *arguments) for task in tasks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def open_results(output: Path, command: str, setting: dict, **facts: Any) -> dict:
    """The results that a file already holds, or an empty set of results.

    Raises:
      SystemExit: if they were made with another setting.
    """
    if not output.exists():
        return {"command": command, "setting": setting, **facts, "runs": []}
    results = json.loads(output.read_text())
    if results["setting"] != setting:
        raise SystemExit(f"{output} holds runs of another setting, {results['setting']}; name another --output, or delete it")
    return results


def write_results(output: Path, results: dict) -> None:
    """Writes a JSON file so that it is whole at any moment, even if the program is stopped."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_suffix(".part")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(output)


def main(
    data: Path,
    weights: Path = WEIGHTS,
    output: Path = RESULTS,
    cache: Path | None = None,
    methods: tuple[str, ...] = tuple(variant.name for variant in VARIANTS),
    trains: tuple[Train, ...] = ("last_stage", "all", "head"),
    seeds: tuple[int, ...] = (0, 1, 2),
    limit: int | None = None,
    processes: int = 1,
    setting: Setting = SETTING,
) -> None:
    """Runs what is not there yet: for each seed, every method on the last stage, on the whole model, and LoRA's alone.

    Args:
      data: zip file or folder with the images.
      weights: the pretrained backbone.
      output: JSON file to append to.
      cache: folder to keep decoded images in.
      methods: names of the variants to run.
      trains: what is trained, with the head; ``head`` is LoRA's branches and the head alone.
      seeds: each determines the new head, order, augmentation and LoRA's branches of its runs.
      limit: stops after this many runs.
      processes: number of runs at a time.
      setting: what all runs share.
    """
    variants = {variant.name: variant for variant in VARIANTS}
    unknown = [name for name in methods if name not in variants]
    if unknown:
        raise SystemExit(f"unknown methods {unknown}; there are: {', '.join(variants)}")
    if not weights.exists():
        raise SystemExit(f"{weights} is missing; make it by experiments/transfer_backbone.py")
    dataset = sweep_images(data, setting, cache)
    facts = {"model": NAME, "images": dataset.name, "pretrained_test_accuracy": load_weights(weights)[1]["test_accuracy"]}
    values, defaults = dataclasses.asdict(setting), dataclasses.asdict(SETTING)
    flags = [f"--setting.{name.replace('_', '-')} {value}" for name, value in values.items() if value != defaults[name]]
    results = open_results(output, " ".join(["python experiments/transfer.py --data", data.name, *flags]), values, **facts)
    done = {(run["variant"], run["train"], run["seed"]) for run in results["runs"]}
    todo: list[Task] = [
        (variants[name], t, seed)
        for seed in seeds
        for t in trains
        for name in methods
        if variants[name].trained_as(t) and (name, t, seed) not in done
    ]
    print(f"{len(dataset.train):,} training and {len(dataset.test):,} test images", flush=True)
    print(f"{len(done)} runs done, {len(todo[:limit])} to do", flush=True)
    for number, result in enumerate(run_all(todo[:limit], processes, setting, weights, data, cache), 1):
        results["runs"].append(result)
        write_results(output, results)
        what = f"{result['train']} {result['variant']}, seed {result['seed']}"
        came_to = f"{result['test_accuracy']:.2%}, {result['run_seconds']:.0f} s"
        print(f"{number}/{len(todo[:limit])} {what}: {came_to}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
