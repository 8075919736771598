"""The results page's sections on what compilers say of machines that are not there."""

from collections.abc import Mapping
from typing import Any

from transfer_report import markdown, prose

_MEASURES = (("temp_bytes", 2**20, 0), ("moved_bytes", 1e9, 1), ("roofline_seconds", 1e-3, 1))


def tables(results: Mapping[str, Any]) -> str:
    """Low rank beside full backpropagation, by the compilers' counts."""
    rows, full = [], {(row["model"], row["target"]): row for row in results["rows"] if row["method"] == "full"}
    for row in results["rows"]:
        first, cells = full.get((row["model"], row["target"]), {}), []
        for name, unit, digits in _MEASURES:
            value, whole = row.get(name), first.get(name)
            cells.append("" if value is None else f"{value / unit:,.{digits}f}")
            cells.append(f"{value / whole:.2f}" if value and whole else "")
        rows.append([row["model"], row["target"], row["method"], *cells, row.get("attention") or "does not compile"])
    size = results["rows"][0]["batch_size"]
    text = f"""
        A training step of {size} images in bfloat16, all layers trained, on one chip. These are the counts of compilers for
        machines that were not there, and no clock's: temporaries as the compiler lays them out, the bytes that its program
        moves and, for the GPU, the sum over its kernels of the time that their products or their bytes take at least. JAX
        {results["jax"]}. SwinV2-S's rows of `full` and `lp_l1-4` for TPUs are older than the present form of its patch
        embedding; its `lp_l1-4+lean` and ViT-B's `lora_all-8+lean` for the H100 than the present kernels of layer norms.
    """
    header = ["model", "machine", "method", "temporaries, MiB", "of full", "moved, GB", "of full", "roofline, ms", "of full"]
    return f"{prose(text)}\n\n{markdown([*header, 'attention'], rows)}"


def families(results: Mapping[str, Any]) -> str:
    """Which steps compile."""
    targets = list(dict.fromkeys(row["target"] for row in results["rows"]))
    cases: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in results["rows"]:
        said = "no" if "error" in row else "yes"
        cases.setdefault((row["model"], row["method"], row["train"]), {})[row["target"]] = said
    rows = [[*case, *(said.get(target, "not tried") for target in targets)] for case, said in cases.items()]
    tried = len(results["rows"])
    compiled = sum("error" not in row for row in results["rows"])
    text = f"{compiled} of {tried} training steps tried compile for machines that were not there (JAX {results['jax']})."
    return f"{text}\n\n{markdown(['model', 'method', 'trained', *targets], rows)}"


def layers(results: Mapping[str, Any]) -> str:
    """Single layers, exact and low-rank."""
    rows = []
    for row in results["rows"]:
        times = [f"{1e6 * row[name]:.1f}" for name in ("exact_seconds", "seconds")]
        gains = [f"{row[name]:.2f}" for name in ("speedup", "bound")]
        rows.append([f"{row['inputs']} -> {row['outputs']}", str(row["r"]), *times, *gains, row["choice"]])
    text = f"""
        The backward pass of the layers of the paper's Table 8 on an H100 that was not there: {results["batch_size"]} images of
        49 tokens in {results["dtype"]}, the projection of the input counted, the time that each kernel's products or bytes take
        at least summed over kernels. No clock's numbers. "At most" is what a pass would gain that does nothing but read x, g
        and the kernel once and write their cotangents once. With `when="faster"` layers that low rank would not make faster
        stay exact. JAX {results["jax"]}.
    """
    header = ["layer", "r", "exact, us", "low rank, us", "exact / low rank", "at most", "the choice"]
    return f"{prose(text)}\n\n{markdown(header, rows)}"
