"""The results page's sections on speed, costs and the training engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from transfer_report import markdown, prose


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, device {machine['device']}, JAX {machine['jax']}, "
        f"Python {machine['python']}, {results['dtype']}; medians of {results['rounds']} interleaved samples."
    )


def bench_layers(results: Mapping[str, Any]) -> str:
    """Times of single layers."""
    rows = []
    for row in results["rows"]:
        authors = row["authors_seconds"]
        rows.append(
            [
                f"{row['inputs']}->{row['outputs']}",
                "x".join(map(str, row["grid"])),
                str(row["batch"]),
                str(row["r"]),
                f"{1e3 * row['dense_seconds']:.2f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{row['speedup']:.2f}",
                f"{row['flop_ratio']:.1f}",
                f"{100 * row['efficiency']:.0f} %",
                f"{1e3 * row['floor_seconds']:.2f}",
                f"{row['over_floor']:.1f}",
                f"{row['predicted']:.1f}",
                "" if authors is None else f"{authors / row['seconds']:.0f}",
            ]
        )
    text = f"""
        Times of the backward pass of one dense layer (those of the paper's Table 8, and one of each other stage of
        EfficientFormer-L1), including the projection of the input in the forward pass. "Efficiency" is the speed-up over the
        FLOP ratio. The floor is the time that the layer's FLOPs take at the measured {results["peak_flops"] / 1e9:.0f} GFLOP/s,
        or its inputs and outputs at {results["bandwidth"] / 1e9:.0f} GB/s, whichever is longer. "Predicted" is the speed-up
        that the automatic choice expects. {_machine(results)}
    """
    header = ["layer", "grid", "batch", "r", "exact, ms", "low-rank, ms", "speed-up", "FLOP ratio", "efficiency", "floor, ms"]
    header += ["time over floor", "predicted", "authors' form over ours"]
    return f"{prose(text)}\n\n{markdown(header, rows)}\n\n![speed-up against FLOP ratio](images/bench_layers.png)"


def bench_step(results: Mapping[str, Any]) -> str:
    """Times of training steps."""
    rows = [
        [
            row["model"],
            row["method"],
            row["train"],
            str(row["batch"]),
            f"{1e3 * row['seconds']:.0f}",
            f"{row['images_per_second']:.1f}",
            f"{row['speedup']:.2f}",
            f"{row['backward_flops'] / 1e6:,.0f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
        ]
        for row in results["rows"]
    ]
    header = [
        "model",
        "method",
        "trained",
        "batch",
        "step, ms",
        "images/s",
        "speed-up",
        "backward MFLOPs/image",
        "MB kept per image",
    ]
    return f"{prose(_machine(results) + ' ' + results.get('note', ''))}\n\n{markdown(header, rows)}"


def transform_times(results: Mapping[str, Any]) -> str:
    """Times of projections and expansions by grid."""
    grids = list(dict.fromkeys(tuple(row["grid"]) for row in results["rows"]))
    kinds = list(dict.fromkeys((row["form"], row["r"]) for row in results["rows"]))
    found = {(row["form"], row["r"], tuple(row["grid"])): f"{row['nanoseconds_per_token']:.0f}" for row in results["rows"]}
    rows = [[form, f"lp_l1-{r}", *(found[form, r, grid] for grid in grids)] for form, r in kinds]
    text = f"""
        Nanoseconds per token of {results["channels"]} channels, with {results["prefix_tokens"]} token in front of the grid;
        adding one to each number takes {results["copy_nanoseconds_per_token"]:.0f}. {_machine(results)}
        {results.get("note", "")}
    """
    return f"{prose(text)}\n\n{markdown(['transform', 'functions', *('x'.join(map(str, grid)) for grid in grids)], rows)}"


def plan_times(results: Mapping[str, Any]) -> str:
    """How long planning takes, and plans whose blocks are alike beside those that differ."""
    times = [
        [row["model"], str(row["batch"]), *(f"{seconds:.1f}" for seconds in (20 * row["step"], row["compiling_a_step"]))]
        + [f"{row[key]:.1f}" for key in ("measuring", "choosing", "timing_layers_and_choosing")]
        for row in results["rows"]
    ]
    names = {"free": "each layer its own", "alike": "`--same-within-stage`"}
    plans = [
        [
            row["model"],
            names[each["plan"].removesuffix("+scan")] + (", `--scan-blocks`" if each["plan"].endswith("+scan") else ""),
            f"{each['loss']:.4f}",
            f"{each['backward_flops'] / 1e6:,.0f}",
            f"{each['saved_bytes'] / 1e6:.1f}",
            f"{1e3 * each['seconds']:.0f}",
        ]
        for row in results["rows"]
        for each in row["plans"]
    ]
    text = f"""
        Seconds, on random images: 20 steps of full backpropagation and the compilation of one; measuring {results["batches"]}
        batches, its own compilation included; choosing under `{results["budget"]}`; and timing layers and choosing under
        `{results["seconds_budget"]}`. {_machine(results)}
    """
    header = ["model", "images a batch", "20 steps", "compiling a step", "measuring", "choosing", "in seconds"]
    then = f"Plans under `{results['budget']}`: what they are predicted to lose, their costs per image and the time of a step."
    columns = ["model", "functions", "predicted loss", "backward MFLOPs", "MB kept", "step, ms"]
    return "\n\n".join([prose(text), markdown(header, times), prose(then), markdown(columns, plans)])


def loader_speed(results: Mapping[str, Any]) -> str:
    """The loader's speed beside a training step's."""
    loader = results["loader_images_per_second_by_workers"]
    workers = list(next(iter(loader.values())))
    rows = [
        [source, *(f"{rates[w]:,.0f}" for w in workers), f"{results['loader_over_step'][source]:.0f}"]
        for source, rates in loader.items()
    ]
    text = f"""
        Images per second of the loader alone, from JPEG files, by number of threads. The last column divides by the
        {results["step_images_per_second"]:.1f} images/s of a training step ({results["model"]}) on the same machine.
        {results["device"]}, JAX {results["jax"]}.
    """
    return f"{prose(text)}\n\n{markdown(['images', *(f'threads: {w}' for w in workers), 'over the step'], rows)}"


def kill_and_resume(results: Mapping[str, Any]) -> str:
    """Interrupted runs, those of the same kind in a row."""
    kinds: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in results["runs"].values():
        kinds.setdefault((str(run["processes"]), run["phase"], run["ended_by"]), []).append(run)

    def listed(runs: list[Mapping[str, Any]], name: str) -> str:
        return ", ".join("-" if run[name] is None else str(run[name]) for run in runs)

    def equal(runs: list[Mapping[str, Any]], name: str) -> str:
        return f"{sum(run[name] for run in runs)} of {len(runs)}"

    rows = [
        [
            *kind,
            *(listed(runs, name) for name in ("last_step_written", "checkpoint_before", "resumed_after")),
            *(equal(runs, name) for name in ("same_metrics", "same_weights")),
        ]
        for kind, runs in kinds.items()
    ]
    text = f"""
        Runs of {results["steps"]} steps, with a moving average and augmentation, were ended at {len(results["runs"])} random
        moments and resumed. Losses, gradient norms, accuracies and weights are compared with those of a run left alone, bit for
        bit. A row has the steps of each of its runs in turn: the last one written, the last whole checkpoint at that moment (0
        for none yet), and the one that the run went on after (0 for beginning again, - where a signal came too late to stop the
        run). {results["device"]}, JAX {results["jax"]}.
    """
    header = ["processes", "while", "ended by", "last step", "checkpoint", "resumed after", "equal metrics", "equal weights"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"


def soak(results: Mapping[str, Any]) -> str:
    """A long run."""
    memory = results["resident_mib"]
    return prose(
        f"""
        {results["steps"]:,} steps on digits with {results["checkpoints_written"]} checkpoints took {results["seconds"]:,.0f} s.
        Every step is {"once" if results["every_step_once"] else "NOT once"} in the metrics, and the last checkpoint is
        {"equal" if results["last_checkpoint_is_the_export"] else "NOT equal"} to the exported weights. Resident memory was
        {memory["at_half"]:.0f} MiB at half time, {memory["at_end"]:.0f} MiB at the end and {memory["most"]:.0f} MiB at most; by
        regression over the second half it grew by {results["mib_per_1000_steps_second_half"]:.1f} MiB per 1,000 steps.
        {results["device"]}, JAX {results["jax"]}.
        """
    )


def cost_tables(results: Mapping[str, Any]) -> str:
    """The paper's cost tables."""
    text = f"""
        FLOPs counted from shapes. Over the rows of Tables 5 and 7, the root mean square difference from the paper is
        {100 * results["rms_difference"]:.1f} %. The largest is {100 * results["worst_difference"]:.1f} % in FLOPs and
        {100 * results["worst_speedup_difference"]:.1f} % in speed-up.
    """
    parts = [prose(text)]
    for name in ("table_5", "table_7"):
        rows = [
            [
                row["model"],
                row["row"],
                f"{row['paper_mflops']:,.1f}",
                f"{row['our_mflops']:,.1f}",
                f"{100 * row['difference']:+.1f} %",
                f"{row['paper_speedup']:.2f}",
                f"{row['our_speedup']:.2f}",
            ]
            for row in results[name]
        ]
        header = ["model", "method", "paper, MFLOPs", "ours, MFLOPs", "difference", "paper, speed-up", "ours, speed-up"]
        parts += [f"### Table {name[-1]}", markdown(header, rows)]
    return "\n\n".join(parts)


def kept_bytes(results: Mapping[str, Any]) -> str:
    """Bytes kept for the backward pass, by setting and with recomputation."""
    settings = list(results["rows"][0]["model_mb"])
    rows = [
        [
            row["model"],
            row["method"],
            f"{row['layers_mb']:.1f}",
            *(f"{row['model_mb'][name]:.1f}" for name in settings),
            *(f"{row[key]:.1f}" for key in ("remat_model_mb", "backward_mflops", "remat_backward_mflops")),
        ]
        for row in results["rows"]
    ]
    text = f"""
        MB per image, in float32, with 100 classes, training the whole model: what dense layers keep, what the whole model does
        by setting ({", ".join(settings)}; [Residuals](residuals.md)), and what is left between blocks that are computed again.
    """
    header = ["model", "method", "layers", *settings, "with remat", "backward MFLOPs", "with remat"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"


def kept_by_kind(results: Mapping[str, Any]) -> str:
    """Bytes kept for the backward pass, by what needs them."""
    kinds, names = list(results["rows"][0]["mb"]), ("model", "method", "residuals")
    rows = [[*(row[name] for name in names), *(f"{row['mb'][kind]:.1f}" for kind in kinds)] for row in results["rows"]]
    text = f"""
        MB per image, in {results["dtype"]}, with {results["num_classes"]} classes, by the module that needs them first in the
        backward pass; [Residuals](residuals.md) explains them.
    """
    picture = "![bytes kept per image, by what needs them](images/kept_by_kind.png)"
    return "\n\n".join([prose(text), picture, markdown([*names, *kinds], rows)])


def temporaries(results: Mapping[str, Any]) -> str:
    """What compiled steps hold besides what is kept."""
    rows = [held_cells(row, results["rows"]) for row in results["rows"]]
    text = f"""
        Steps of {results["rows"][0]["batch_size"]} images in float32, compiled for a CPU (JAX {results["jax"]}); 100 classes,
        MiB. `held` is what the compiler plans for a step besides its arguments and results, by `memory_analysis`; the sum is of
        the bytes kept, the parameters' gradients and the most that one block alone holds. See [blocks as loops](residuals.md).
    """
    header = ["model", "method", "kept", "gradients", "a block", "held", "of the sum", "of full"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"


def step_profile(results: Mapping[str, Any]) -> str:
    """Steps beside PyTorch's, and what they spend their time on."""
    machine = results["machine"]
    steps = list(results["rows"][0]["seconds"])
    parts = [
        prose(
            f"""
            Training steps beside those of PyTorch {machine["torch"]} with timm {machine["timm"]}, in ms, and how many times as
            fast as PyTorch's faster memory layout. {_machine(results)}
            """
        ),
        markdown(
            ["model", "batch", *steps],
            [[row["model"], str(row["batch"]), *(_times(row, step) for step in steps)] for row in results["rows"]],
        ),
        "Where a step spends its time, in ms. Operations that run at a time share it; kinds go by the place in the model, and "
        "compilers fuse operations of several.",
    ]
    for row in results["rows"]:
        profiled = list(row["kinds"])
        kinds = sorted({kind for sums in row["kinds"].values() for kind in sums})
        table = [[kind, *(f"{1e3 * row['kinds'][step].get(kind, 0):.1f}" for step in profiled)] for kind in kinds]
        shown = [
            [step, each["kind"], each["operation"], f"{1e3 * each['seconds']:.1f}"]
            for step in profiled
            for each in row["dearest"][step]
        ]
        parts += [f"### {row['model']}", markdown(["kind", *profiled], table)]
        parts += [markdown(["step", "kind", "operation and shape", "ms"], shown)]
    return "\n\n".join(parts)


def inference_speed(results: Mapping[str, Any]) -> str:
    """Evaluation and prediction beside PyTorch's."""
    machine, columns = results["machine"], list(results["rows"][0]["images_per_second"])
    text = f"""
        Images per second, {results["batch"]} at a time, and how many times as many as in PyTorch's faster memory layout;
        PyTorch {machine["torch"]} with timm {machine["timm"]}. {_machine(results)}
    """
    rows = []
    for row in results["rows"]:
        rates = row["images_per_second"]
        best = max(rate for name, rate in rates.items() if name.startswith("PyTorch"))
        rows.append([row["model"], *(f"{rates[column]:.1f} ({rates[column] / best:.2f})" for column in columns)])
    return f"{prose(text)}\n\n{markdown(['model', *columns], rows)}"


def lean_convolutions(results: Mapping[str, Any]) -> str:
    """Other people's convolutional networks, plain and under the rule ``Lean``."""
    text = f"""
        Milliseconds of a forward and a backward pass, batch {results["batch"]}, of two small networks in plain Flax that
        the experiment's source shows, how many times as fast as plain that is, and megabytes kept for each image. Rule:
        `Lean("conv", ...)`. {_machine(results)}
    """
    rows = []
    for row in results["rows"]:
        first = next(iter(row["seconds"].values()))
        for name, seconds in row["seconds"].items():
            cells = [f"{1e3 * seconds:,.0f} ({first / seconds:.2f})", f"{row['kept_bytes'][name] / 1e6:.1f}"]
            rows.append([row["model"], name, *cells])
    return f"{prose(text)}\n\n{markdown(['network', 'convolutions', 'ms', 'MB kept per image'], rows)}"


def _times(row: Mapping[str, Any], step: str) -> str:
    seconds = row["seconds"][step]
    return f"{1e3 * seconds:,.0f} ({row['seconds'][row['best']] / seconds:.2f})"


def held_cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of ``temporaries`` as text."""
    parts = [row[name] for name in ("kept", "gradients", "block")]
    full = next(other["held"] for other in rows if (other["model"], other["method"]) == (row["model"], "full"))
    mib = [f"{number / 2**20:,.0f}" for number in (*parts, row["held"])]
    return [row["model"], row["method"], *mib, f"{row['held'] / sum(parts):.2f}", f"{row['held'] / full:.2f}"]
