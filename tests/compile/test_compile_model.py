"""``lbpwht compile`` where no compiler but the CPU's is needed."""

import importlib.util
import json
import sys

import jax
import pytest

from lbpwht_jax.adaptation.presets import adapted_model
from lbpwht_jax.bench.program import measured_model, step_program
from lbpwht_jax.cli import main
from lbpwht_jax.compile import CompilerError, compile_model
from lbpwht_jax.train import Placement

MODEL = "vit_micro_patch4_28"


@pytest.fixture(scope="module")
def row(request):
    return compile_model(MODEL, ("lp_l1-2",), "cpu:1", batch_size=8, num_classes=100)[0]


def test_arguments_and_outputs_by_hand(row):
    model = adapted_model(MODEL, "lp_l1-2", num_classes=100)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # parameters and AdamW's two moments, float32; two counters, the step and the flag; uint8 images and int32 labels: nothing
    # in the step asks whether an image is real, or how wide it was
    state = 3 * 4 * parameters + 3 * 4 + 1
    assert row.argument_bytes == state + 8 * (28 * 28 + 4)
    # the new state; loss, accuracy, norm and whether all is finite; a result is a pointer to each of its arrays on a CPU
    leaves = 3 * len(jax.tree.leaves(shapes)) + 4 + 4
    assert row.output_bytes - 8 * leaves == state + 3 * 4 + 1
    assert row.alias_bytes <= state


@pytest.mark.heavy
def test_temporaries_are_those_of_the_step_that_bench_times(row):
    program = step_program(MODEL, measured_model(MODEL, "lp_l1-2", "all", 100), 8, 100, Placement(devices=jax.devices()[:1]))
    memory = program.step.lower(program.abstract_state(), program.abstract_batch()).compile().memory_analysis()
    assert row.temp_bytes == memory.temp_size_in_bytes
    assert row.argument_bytes == memory.argument_size_in_bytes


def test_all_layers_of_the_step_are_counted(row):
    # six blocks of qkv, proj, fc1 and fc2; LP_{L1-2} speeds up all of them
    assert row.layers == {"low_rank": 24, "exact_by_choice": 0, "exact_for_speed": 0, "frozen": 0}


def test_what_a_cpu_does_not_tell_is_none(row):
    assert row.kernels is row.roofline_seconds is row.fits is row.compute_seconds is None
    assert row.flops > 0 and row.moved_bytes > row.argument_bytes and row.attention == "plain"


def stand_in(tmp_path, monkeypatch, script):
    """Has a script stand in for the process that compiles; it finds the request in ``request`` and writes ``result``."""
    file = tmp_path / "compiler"
    opening = f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
    file.write_text(opening + "request, result = json.loads(sys.argv[3]), pathlib.Path(sys.argv[4])\n" + script)
    file.chmod(0o755)
    monkeypatch.setattr("lbpwht_jax.compile.compiling.sys.executable", str(file))


CRASH = """
if request["method"] == "full":
    keys = "model", "method", "target", "batch_size"
    result.write_text(json.dumps({**{k: request[k] for k in keys}, "temp_bytes": 5 * 2**20, "attention": "plain"}))
else:
    print("Check failed: uint2 is too narrow", file=sys.stderr, flush=True)
    os.abort()
"""


def test_a_crash_is_reported_and_the_other_methods_are_printed(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, CRASH)
    arguments = ["compile", MODEL, "--methods", "lp_l1-4", "full", "--target", "cpu:1"]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert row["method"] == "full" and row["temp_bytes"] == 5 * 2**20 and row["moved_bytes"] is None
    assert "lp_l1-4: the compiler ended with signal 6" in captured.err and "uint2 is too narrow" in captured.err
    assert main(arguments) == 1
    assert "5 MiB" in capsys.readouterr().out
    with pytest.raises(CompilerError, match="uint2"):
        compile_model(MODEL, ("full", "lp_l1-4"))


KEYS = ["model", "method", "target", "batch_size", "argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "moved_bytes"]
KEYS += ["flops", "kernels", "roofline_seconds", "attention"]


def test_the_keys_of_a_row(tmp_path, monkeypatch, capsys):
    stand_in(tmp_path, monkeypatch, CRASH)
    assert main(["compile", MODEL, "--methods", "full", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(KEYS) <= set(row) and not {"fits", "largest_batch", "dearest"} & set(row)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target", "v9:2x2"], "unknown target 'v9:2x2'"),
        (["--target", "cpu:3"], "a batch of 64 images cannot be shared equally by the 3 chips of cpu:3; make the batch size"),
        (["--methods", "half"], "unknown method 'half'"),
        (["--batch-size", "0"], "batch-size must be positive"),
        (["--fit"], "has no memory of a known size"),
        (["--methods", "lp_l1-4", "--train", "head"], "training the head alone"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["compile", MODEL, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


def test_an_unknown_model(capsys):
    assert main(["compile", "resnet50"]) == 2
    assert "resnet50" in capsys.readouterr().err


@pytest.mark.parametrize("target, package", [("v5e:1x1", "libtpu"), ("h100", "jax_cuda13_plugin")])
def test_the_extra_is_missing(target, package, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert main(["compile", MODEL, "--target", target]) == 2
    message = capsys.readouterr().err
    assert package in message and "pip install 'lbpwht_jax[compile]'" in message
