"""How well the constants of the paper's count hold on rows that they were not fitted to.

    python experiments/cost_constants.py

The paper prints no FLOPs per element; those in ``lbpwht_jax.cost.paper`` were chosen by hand with all rows of Tables 5 and 7 in
view. Here they are fitted again, by non-negative least squares on relative errors, to every other row, and judged on the rows
between; then the other way round. Writes results/cost_constants.json.
"""

import json
from pathlib import Path

import numpy as np
import tyro
from scipy.optimize import nnls

from experiments.cost_tables import CLASSES, RESULTS, TABLE_5, TABLE_7, row_records
from lbpwht_jax.cost.paper import FLOPS_PER_ELEMENT, paper_flops
from lbpwht_jax.cost.trace import Elementwise

KINDS = tuple(FLOPS_PER_ELEMENT)


def relative_shares() -> tuple[np.ndarray, np.ndarray]:
    """What makes up each row, over the row's figure in the paper.

    Returns:
      ``[rows]``, FLOPs of products and biases, and ``[rows, kinds]``, numbers of elements by kind of element-wise work.
    """
    products, elements = [], []
    for number, table in (("5", TABLE_5), ("7", TABLE_7)):
        for row in table:
            records, paper = row_records(row, CLASSES[number]), 1e6 * row.mflops
            work = [record for record, _ in records if isinstance(record, Elementwise)]
            products.append(sum(paper_flops(r, spec) for r, spec in records if not isinstance(r, Elementwise)) / paper)
            elements.append([sum(record.elements for record in work if record.kind == kind) / paper for kind in KINDS])
    return np.array(products), np.array(elements)


def errors(products: np.ndarray, elements: np.ndarray, constants: np.ndarray) -> dict[str, float]:
    """Relative errors of a count with these constants: root mean square and the largest."""
    off = products + elements @ constants - 1
    return {"rms": float(np.sqrt(np.mean(off**2))), "worst": float(np.abs(off).max())}


def held_out(products: np.ndarray, elements: np.ndarray) -> dict[str, dict]:
    """For each half of the rows: constants fitted to it, and errors on both, beside those of the constants in use."""
    in_use, results = np.array([FLOPS_PER_ELEMENT[kind] for kind in KINDS], float), {}
    for name, fitted in (("even rows", slice(0, None, 2)), ("odd rows", slice(1, None, 2))):
        other = slice(1 - fitted.start, None, 2)
        constants = nnls(elements[fitted], 1 - products[fitted])[0]
        results[name] = {
            "constants": dict(zip(KINDS, constants.tolist(), strict=True)),
            "fitted": errors(products[fitted], elements[fitted], constants),
            "held_out": errors(products[other], elements[other], constants),
            "in_use": errors(products[fitted], elements[fitted], in_use),
        }
    return results


def main(output: Path = RESULTS) -> None:
    """Fits, prints and writes cost_constants.json.

    Args:
      output: the folder to write to.
    """
    results = held_out(*relative_shares())
    for name, half in results.items():
        print(name, json.dumps(half, indent=1))
    text = json.dumps({"command": "python experiments/cost_constants.py", **results}, indent=2)
    (output / "cost_constants.json").write_text(text + "\n")


if __name__ == "__main__":
    tyro.cli(main)
