"""What the compilers of TPUs and GPUs say of one small model: needs the extra [compile], so not among the other tests."""

import json
import math

import jax
import pytest

from lbpwht_jax.adaptation.presets import adapted_model
from lbpwht_jax.cli import main

MODEL, BATCH = "vit_micro_patch4_28", 8
METHODS = ("full", "lp_l1-2")
KEYS = ["model", "method", "target", "batch_size", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "moved_bytes"]
KEYS += ["flops", "kernels", "roofline_seconds", "attention"]


@pytest.fixture(scope="module", params=["h100", "v5e:2x2"])
def rows(request):
    """The rows that the command prints."""
    capture = pytest.MonkeyPatch()
    printed = []
    capture.setattr("builtins.print", lambda text: printed.append(text))
    arguments = ["--target", request.param, "--batch-size", str(BATCH), "--dtype", "bfloat16", "--json", "--kernels"]
    arguments += ["--when", "always"]  # the choice leaves the layers of so small a model exact on TPUs
    code = main(["compile", MODEL, "--methods", *METHODS, *arguments])
    capture.undo()
    assert code == 0
    return json.loads("\n".join(printed))


def test_rows(rows):
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert set(KEYS) <= set(row)
        gpu = row["target"] == "h100"
        assert (row["kernels"] is not None) == (row["roofline_seconds"] is not None) == gpu
        assert row["attention"] in ("plain", "cudnn", "kernel")
        assert row["moved_bytes"] > row["argument_bytes"] > row["alias_bytes"] > 0
        if gpu:
            floors = row["compute_seconds"], row["memory_seconds"]
            assert row["roofline_seconds"] >= max(floors) * (1 - 1e-9)  # sums in another order
            assert len(row["dearest"]) == 10


def test_arguments_by_hand(rows):
    model = adapted_model(MODEL, "full")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    arrays = [math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(shapes)]
    for row in rows:
        chips = 1 if row["target"] == "h100" else 4
        by_hand = 3 * sum(arrays) + 3 * 4 + 1 + BATCH // chips * (28 * 28 + 4)
        if chips == 1:
            assert row["argument_bytes"] == by_hand
        else:  # a TPU pads arrays to tiles of 8 x 128, a vector to 1024
            assert by_hand <= row["argument_bytes"] <= by_hand + 3 * len(arrays) * 8 * 128 * 4 + 8 * 28 * 128 * 32


def test_collectives_by_hand(rows):
    # the chips sum every gradient, those of full backpropagation in bfloat16, as they are computed, but for a few small ones
    shapes = jax.eval_shape(adapted_model(MODEL).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    full, low_rank = (row["collective_bytes"] for row in rows)
    if rows[0]["target"] == "h100":
        assert full == low_rank == {}
    else:
        assert full == {"all-reduce": pytest.approx(2 * parameters, rel=0.1)}
        assert 0.9 * 2 * parameters < low_rank["all-reduce"] < 1.1 * 4 * parameters


def test_products_are_those_of_the_model(rows):
    full, low_rank = rows
    assert low_rank["flops"] < full["flops"]
