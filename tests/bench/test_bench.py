import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbpwht_jax import lp_l1
from lbpwht_jax.bench import authors_form
from lbpwht_jax.bench.program import split_method
from lbpwht_jax.bench.timing import interleaved, machine
from lbpwht_jax.cli import main
from lbpwht_jax.ops.matmul import low_rank_matmul


@pytest.mark.parametrize(
    ("method", "name", "fields"),
    [
        ("full", "full", {}),
        ("full+remat", "full", {"remat": True}),
        ("lp_l1-4+lora_all-8+remat+lean", "lp_l1-4+lora_all-8", {"residuals": "lean", "remat": True}),
        ("lp_l1-4+scan+lean", "lp_l1-4", {"residuals": "lean", "scan_blocks": True}),
        # what is said twice, or alone, stays for the parser of methods to refuse
        ("full+lean+tiny", "full+lean", {"residuals": "tiny"}),
        ("lean", "lean", {}),
    ],
)
def test_options_at_the_end_of_a_method(method, name, fields):
    assert split_method(method) == (name, fields)


def test_medians_of_interleaved_calls():
    order = []

    def sleeper(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return call

    times = interleaved({"short": sleeper("short", 0.005), "long": sleeper("long", 0.03)}, rounds=3)
    assert times["short"] >= 0.005 and times["long"] >= 0.03  # sleeping is never shorter than asked for
    assert order[4:] == ["short", "long"] * 3


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (14, 14), (5, 12)], ids=str)
def test_the_authors_form_is_the_official_projection(grid):
    rng = np.random.default_rng(0)
    shapes = ((2, grid[0] * grid[1], 3), (3, 4), (2, grid[0] * grid[1], 4))
    x, kernel, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    spec = lp_l1(4, projection="official")
    ours = jax.vjp(lambda x, kernel: low_rank_matmul(x, kernel, spec, grid), x, kernel)[1](g)
    for a, b in zip(authors_form.backward(x, kernel, g, spec, grid), ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # float32 sums of up to 512 products


@pytest.mark.heavy
def test_bench_layers_writes_what_it_shows(tmp_path, capsys):
    arguments = [
        "--only",
        "table8",
        "--batch",
        "1",
        "--ranks",
        "2",
        "8",
        "--rounds",
        "1",
        "--authors",
        "--output",
        str(tmp_path),
    ]
    assert main(["bench", "layers", *arguments]) == 0
    result = json.loads((tmp_path / "layers.json").read_text())
    assert [(row["inputs"], row["outputs"], row["r"]) for row in result["rows"]][:3] == [
        (448, 1792, 2),
        (448, 1792, 8),
        (1792, 448, 2),
    ]
    for row in result["rows"]:
        assert row["error"] < 1e-4 and row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        # as many products as coefficients, and the transforms
        assert row["flop_ratio"] < {2: 49 / 3, 8: 49 / 34}[row["r"]]
        assert row["floor_seconds"] > 0 and row["authors_seconds"] > 0
    assert result["machine"] == machine() and result["peak_flops"] > 0 and result["bandwidth"] > 0
    assert (tmp_path / "layers.png").stat().st_size > 5000
    assert "448->1792" in capsys.readouterr().out


@pytest.mark.heavy
def test_bench_step_writes_what_it_shows(tmp_path, capsys):
    arguments = [
        "--models",
        "vit_micro_patch4_28",
        "--methods",
        "full",
        "lp_l1-2",
        "lora_all-8",
        "full+remat",
        "--train",
        "all",
    ]
    assert main(["bench", "step", *arguments, "--batch-size", "2", "--rounds", "1", "--output", str(tmp_path)]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert rows["lp_l1-2"]["backward_flops"] < rows["full"]["backward_flops"]
    assert rows["full+remat"]["saved_bytes"] < rows["lp_l1-2"]["saved_bytes"] < rows["full"]["saved_bytes"]
    assert all(row["images_per_second"] == pytest.approx(2 / row["seconds"]) for row in rows.values())
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert "full+remat" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["layers", "--batch", "0"], "--batch must be positive"),
        (["layers", "--ranks", "20"], "r must be from 1 to 15"),
        (["step", "--rounds", "0"], "--rounds must be positive"),
        (["step", "--methods", "half"], "unknown method"),
        (["step", "--models", "resnet50"], "resnet50"),
    ],
)
def test_mistakes_are_reported(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
