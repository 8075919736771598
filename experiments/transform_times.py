"""Times of the projection and the expansion per token, on grids that are multiples of 8 and on others.

    python experiments/transform_times.py

writes experiments/results/transform_times.json. The numbers of images are such that all inputs have about as many tokens.
"""

import math
from pathlib import Path

import jax
import tyro

from lbpwht_jax import lp_l1
from lbpwht_jax.bench import interleaved, machine
from lbpwht_jax.ops.projection import coefficient_count, expand, project
from lbpwht_jax.runs.folder import write_json

RESULTS = Path(__file__).parent / "results" / "transform_times.json"
GRIDS = ((14, 14), (16, 16), (24, 24), (27, 27), (32, 32), (37, 37), (40, 40))
RANKS = (2, 4, 6)
PREFIX = 1


def main(channels: int = 384, tokens: int = 12_000, rounds: int = 15) -> None:
    """Measures all grids in turn.

    Args:
      channels: of the tokens.
      tokens: in all images together, about.
      rounds: samples of each time; medians count.
    """
    functions, counts, parts = {}, {}, {}
    for grid in GRIDS:
        images = max(1, round(tokens / math.prod(grid)))
        x = jax.random.normal(jax.random.key(0), (images, PREFIX + math.prod(grid), channels))
        for r in RANKS:
            spec = lp_l1(r)
            forward = jax.jit(lambda x, spec=spec, grid=grid: project(x, spec, grid, PREFIX))
            back = jax.jit(lambda c, spec=spec, grid=grid: expand(c, spec, grid, PREFIX))
            coefficients = forward(x)
            for name, run, given in (("project", forward, x), ("expand", back, coefficients)):
                key = f"{name} {grid[0]}x{grid[1]} r={r}"
                functions[key] = lambda run=run, given=given: run(given)
                counts[key] = images * math.prod(grid)
                parts[key] = {"form": name, "grid": grid, "r": r, "coefficients": coefficient_count(spec, grid)}
    x = jax.random.normal(jax.random.key(0), (tokens, channels))
    add = jax.jit(lambda x: x + 1)
    functions["copy"], counts["copy"] = lambda: add(x), tokens
    seconds = interleaved(functions, rounds)
    rows = [{**parts[key], "nanoseconds_per_token": 1e9 * seconds[key] / counts[key]} for key in parts]
    copied = 1e9 * seconds["copy"] / counts["copy"]
    settings = {"channels": channels, "prefix_tokens": PREFIX, "dtype": "float32", "rounds": rounds}
    write_json(RESULTS, {"machine": machine(), **settings, "copy_nanoseconds_per_token": copied, "rows": rows})
    for form in ("project", "expand"):
        for r in RANKS:
            times = [
                f"{row['grid'][0]}: {row['nanoseconds_per_token']:.0f}" for row in rows if (row["form"], row["r"]) == (form, r)
            ]
            print(form, f"r={r}", *times, f"copy: {copied:.0f}")


if __name__ == "__main__":
    tyro.cli(main)
