"""What a run outlives: damaged files, a lost terminal, a full disk, hand-edited configurations."""

import contextlib
import json
import os
import re
import resource
import shutil

import chex
import jax
import numpy as np
import pytest
from pictures import dark_and_bright

import lbpwht_jax
from lbpwht_jax.cli import main
from lbpwht_jax.runs.finished import load_run
from lbpwht_jax.runs.metrics import read_metrics
from lbpwht_jax.train.checkpoint import FOLDER
from lbpwht_jax.weights.files import load_weights, save_weights

OPTIONS = ["--method", "full", "--train", "head", "--epochs", "2", "--batch-size", "8", "--checkpoint-every", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of twelve small images each: twenty to train on, four to test on."""
    return dark_and_bright(tmp_path_factory.mktemp("images"), 12)


def finetune(capsys, *arguments):
    """Exit code, output and errors of ``lbpwht finetune``."""
    return lbpwht(capsys, "finetune", *arguments)


def lbpwht(capsys, *arguments):
    """Exit code, output and errors of a command."""
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
    """A finished run of four steps, two an epoch, with the checkpoints 3 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *OPTIONS, "--dataset", f"folder:{images}", "--output", str(folder)]) == 0
    assert sorted(path.name for path in (folder / FOLDER).iterdir()) == ["3", "4"]
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it that lacks its end."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "result.json").unlink()
    (folder / "weights.safetensors").unlink()
    return folder


def same_end(run, whole):
    """Whether a run came to the same end as the whole one, its times but for."""
    untimed = [[[s._replace(seconds=0) for s in steps], epochs] for steps, epochs in map(read_metrics, (run, whole))]
    assert untimed[0] == untimed[1]
    assert (run / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_the_header_tells_the_splits_apart(whole, run, capsys):
    code, out, _ = finetune(capsys, "--resume", run, "--resume-step", "3")
    assert code == 0
    assert "(20 training, 0 validation and 4 test images are listed, 2 classes), going on after step 3" in out
    assert "No validation images: each epoch measures the test images, and the best checkpoint is the last epoch's." in out
    # the weights' bytes too: their header is in order
    same_end(run, whole)
    assert json.loads((run / "config.json").read_text())["versions"]["lbpwht_jax"] == lbpwht_jax.__version__


def test_one_damaged_checkpoint(whole, run, capsys):
    damaged = run / FOLDER / "4" / "metrics" / "metrics"
    damaged.write_bytes(b"\0")
    code, _, error = finetune(capsys, "--resume", run)
    assert code == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"lbpwht: checkpoint 4 of {run} is damaged (")
    assert f"lbpwht finetune --resume {run} --resume-step 3" in error
    assert lbpwht(capsys, "evaluate", run, "--checkpoint", "4")[0] == 2
    assert lbpwht(capsys, "evaluate", run, "--checkpoint", "3")[0] == 0
    damaged.write_bytes((whole / FOLDER / "4" / "metrics" / "metrics").read_bytes())
    (run / FOLDER / "3" / "metrics" / "metrics").write_bytes(b"[")
    code, out, _ = finetune(capsys, "--resume", run)
    assert code == 0 and f"checkpoint 3 of {run} is damaged" in out
    same_end(run, whole)


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (lambda text: b"\0" + text, "metrics.jsonl: line 1 is no step or epoch"),
        (lambda text: text.replace(b"step", b"stop", 1), "metrics.jsonl: line 1 is no step or epoch"),
        (lambda text: None, "metrics.jsonl is missing and with it 4 of the 4 steps done"),
    ],
)
def test_metrics_that_are_damaged_or_missing(damage, note, whole, run, capsys):
    file = run / "metrics.jsonl"
    before = damage(file.read_bytes())
    file.unlink() if before is None else file.write_bytes(before)
    code, out, _ = finetune(capsys, "--resume", run)
    assert code == 0 and note in out
    if before is not None:
        assert (run / "metrics.jsonl.damaged").read_bytes() == before
        assert read_metrics(run)[0] == read_metrics(whole)[0][1:] and read_metrics(run)[1] == read_metrics(whole)[1]
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, whole))
    assert ours["test_accuracy"] == theirs["test_accuracy"]
    chex.assert_trees_all_equal(*(load_weights(each / "weights.safetensors")[0] for each in (run, whole)), strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"lr": 0.05}}, r"config.json: recipe.lr is 0.05, but checkpoint 4 was made with 0.0005; put it back"),
        ({"mean": [0.25]}, "config.json: mean is (0.25,), but checkpoint 4 was made with (0.5,)"),
        ({"dtype": "bfloat16"}, "config.json: dtype is 'bfloat16', but checkpoint 4 was made with 'float32'"),
    ],
)
def test_a_configuration_that_was_edited(change, message, run, capsys):
    file = run / "config.json"
    values = json.loads(file.read_text())
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(values))
    code, _, error = finetune(capsys, "--resume", run)
    assert code == 2 and message in error


@contextlib.contextmanager
def lost(device):
    """A file that cannot be written to: a pipe whose reader has gone, or a device."""
    if device is None:
        reading, device = os.pipe()
        os.close(reading)
    with open(device, "w") as file:
        yield file


@pytest.mark.parametrize("device", [None, "/dev/full"])
def test_a_run_outlives_its_output(device, whole, run, monkeypatch):
    with lost(device) as output, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        assert main(["finetune", "--resume", str(run), "--resume-step", "3"]) == 0
    same_end(run, whole)


def test_a_file_that_cannot_be_written(whole, run, capsys):
    """Too large a file for the limits: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        code, _, error = finetune(capsys, "--resume", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    weights = run / "weights.safetensors"
    assert code == 1 and len(error.splitlines()) == 1
    assert f"cannot write {weights}: File too large" in error and "the checkpoints are as they were" in error
    assert f"lbpwht finetune --resume {run}" in error and not list(run.glob("weights*"))
    assert finetune(capsys, "--resume", run)[0] == 0
    same_end(run, whole)


def test_divergence_leaves_a_finite_state_and_evaluation_tells_one_that_is_not(images, run, tmp_path, capsys):
    options = [*OPTIONS, "--dataset", f"folder:{images}", "--lr", "1e30", "--warmup-steps", "0", "--output", tmp_path / "high"]
    code, _, error = finetune(capsys, *options)
    assert code == 1 and re.search(
        r"not finite at step \d; lower the learning rate; the state after step \d, all finite", error
    )
    last = load_run(tmp_path / "high", "last")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.variables))
    variables = jax.tree.map(np.array, last.variables)
    variables["params"]["head"]["bias"][1] = np.nan
    save_weights(run / "weights.safetensors", variables, {})
    code, out, error = lbpwht(capsys, "evaluate", run)
    assert (code, out) == (1, "")
    assert "holds numbers that are not finite, in 1 arrays such as params/head/bias: the run diverged; use an earlier" in error


def test_validation_images_choose_and_test_images_are_measured_once(images, tmp_path, capsys):
    options = [*OPTIONS, "--dataset", f"folder:{images}", "--validation", "0.2", "--output", tmp_path / "run"]
    code, out, _ = finetune(capsys, *options)
    assert code == 0 and "(16 training, 4 validation and 4 test images are listed, 2 classes)" in out
    assert "use the validation images alone; the test images are measured once, at the end" in out.replace("\n", " ")
    assert out.count("validation accuracy") == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [set(epoch) for epoch in epochs] == 2 * [{"kind", "number", "step", "validation_accuracy", "validation_loss"}]
    for split, wanted in (
        ("test", json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"]),
        ("validation", epochs[-1]["validation_accuracy"]),
    ):
        code, out, _ = lbpwht(capsys, "evaluate", tmp_path / "run", "--split", split, "--json")
        found = json.loads(out)
        assert (code, found["accuracy"], found["images"]) == (0, wanted, 4)
    assert (
        "has no validation images"
        in lbpwht(capsys, "evaluate", tmp_path / "run", "--dataset", f"folder:{images}/", "--split", "validation")[2]
    )
