import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest
from interrupted_runs import digits
from PIL import Image
from sklearn.datasets import load_digits

from lbpwht_jax import adapt, create_model, load_pretrained
from lbpwht_jax.adaptation.presets import parse_method
from lbpwht_jax.cli import main
from lbpwht_jax.models import model_info
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.finished import load_run
from lbpwht_jax.runs.metrics import read_metrics
from lbpwht_jax.train import Placement
from lbpwht_jax.weights.files import BUNDLED, load_bundled, load_weights
from lbpwht_jax.weights.peft import load_adapter

# 25 steps on 600 images; a rate that gets somewhere in them
METHOD, STEPS = "lp_l1-2", 25
SHORT = [
    "--method",
    METHOD,
    "--train",
    "last_stage",
    "--epochs",
    "1",
    "--batch-size",
    "24",
    "--lr",
    "3e-3",
    "--warmup-steps",
    "3",
]


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """A data set of 240 images of digits to train on and 20 to test on."""
    folder = tmp_path_factory.mktemp("digits") / "few"
    digits(folder, train=24, test=2)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def some_digits(tmp_path_factory):
    """A data set of 600 images of digits to train on and 90 to test on."""
    folder = tmp_path_factory.mktemp("digits") / "some"
    digits(folder, train=60, test=9)
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def compared(tmp_path_factory, some_digits):
    """A short run of the last stage beside full backpropagation: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["finetune", *SHORT, "--dataset", some_digits, "--compare", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def folders(folder):
    return {METHOD: folder, "full": folder / "compare" / "full"}


def test_dtype_and_remat_reach_the_model(compared):
    config = dataclasses.replace(run_folder.read_config(compared[0]), dtype="bfloat16", remat=True)
    model = config.module()
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), config.images())
    assert model.settings.remat and logits.dtype == "bfloat16"
    state = config.abstract_state(config.adapted(), Placement())
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state.params, state.optimizer)) if leaf.ndim} == {"float32"}


def lbpwht(capsys, *arguments):
    """What a command printed."""
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def mistake(capsys, *arguments):
    """What a mistaken command reported."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_the_run_folder_is_complete(compared, some_digits):
    for method, folder in folders(compared[0]).items():
        config = json.loads((folder / "config.json").read_text())
        assert config["method"] == method and config["dataset"] == some_digits
        assert config["recipe"]["epochs"] == 1
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["number"] for line in lines if line["kind"] == "step"] == list(range(1, STEPS + 1))
        accuracies = [line["test_accuracy"] for line in lines if line["kind"] == "epoch"]
        assert len(accuracies) == 1
        assert json.loads((folder / "result.json").read_text())["test_accuracy"] == accuracies[-1]
        with Image.open(folder / "curves.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5


def test_the_folder_is_all_that_evaluation_needs(compared, capsys):
    accuracy = json.loads((compared[0] / "result.json").read_text())["test_accuracy"]
    found = json.loads(lbpwht(capsys, "evaluate", compared[0], "--json"))
    assert (found["accuracy"], found["images"]) == (accuracy, 90)
    # far from chance after an epoch, short of what fifteen come to
    assert accuracy > 0.5
    best = json.loads(lbpwht(capsys, "evaluate", compared[0], "--checkpoint", "best", "--batch-size", "40", "--json"))
    # without validation images, the best checkpoint is the last epoch's
    assert best["accuracy"] == read_metrics(compared[0])[1][-1].test_accuracy


def test_the_weights_rebuild_the_model(compared):
    variables, metadata = load_weights(compared[0] / "weights.safetensors")
    assert metadata == {"model": BUNDLED, "classes": list("0123456789")}
    model, images = create_model(BUNDLED, num_classes=10), np.zeros((1, 28, 28, 1), np.float32)
    last = load_run(compared[0], "last")
    np.testing.assert_array_equal(model.apply(variables, images), last.module.apply(last.variables, images))


def test_predictions(compared, capsys, tmp_path):
    pixels, targets = load_digits(return_X_y=True)
    files = [tmp_path / f"{i}.png" for i in range(40)]
    for file, image in zip(files, pixels, strict=False):
        Image.fromarray(np.rint(image.reshape(8, 8) * (255 / 16)).astype(np.uint8)).save(file)
    rows = json.loads(lbpwht(capsys, "predict", compared[0], *files, "--top-k", "10", "--json"))
    assert [row["image"] for row in rows] == list(map(str, files))
    first = [row["predictions"][0]["class"] for row in rows]
    assert np.mean([int(name) == target for name, target in zip(first, targets, strict=False)]) > 0.6
    for row in rows:
        probabilities = [each["probability"] for each in row["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
        assert {each["class"] for each in row["predictions"]} == set("0123456789")
    assert f"{first[0]} {rows[0]['predictions'][0]['probability']:.1%}" in lbpwht(capsys, "predict", compared[0], files[0])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deeper").mkdir()
    files[0].rename(tmp_path / "deeper" / "0.png")
    of_folder = json.loads(lbpwht(capsys, "predict", compared[0], tmp_path, "--top-k", "10", "--json"))
    assert [row["image"] for row in of_folder] == sorted(map(str, [tmp_path / "deeper" / "0.png", *files[1:]]))
    assert of_folder[-1]["predictions"] == rows[0]["predictions"]
    assert "cannot read the image" in mistake(capsys, "predict", compared[0], tmp_path / "missing.png")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in mistake(capsys, "predict", compared[0], tmp_path / "empty")


def test_export_of_a_run(compared, capsys, tmp_path):
    lbpwht(capsys, "export", compared[0], tmp_path / "timm.safetensors")
    again = load_pretrained(BUNDLED, tmp_path / "timm.safetensors")
    chex.assert_trees_all_equal(again, load_weights(compared[0] / "weights.safetensors")[0], strict=True)
    assert "write lbpwht export vit_micro_patch4_28 SOURCE OUTPUT" in mistake(capsys, "export", BUNDLED, tmp_path / "x")
    assert f"write lbpwht export {compared[0]} OUTPUT" in mistake(capsys, "export", compared[0])
    assert "is no run folder: cannot read" in mistake(capsys, "export", tmp_path, tmp_path / "x")
    assert "--num-classes and --image-size do not go" in mistake(
        capsys, "export", compared[0], tmp_path / "x", "--num-classes", "3"
    )


def test_other_classes_than_the_run_knows(compared, capsys, tmp_path):
    for part in ("train", "test"):
        for name in [*"0123456789", "ten"]:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / part / name / "image.png")
    message = mistake(capsys, "evaluate", compared[0], "--dataset", f"folder:{tmp_path}")
    assert (
        "has other classes than the run, which knows no more than those it was trained on: 11 instead of 10; ten new" in message
    )


@pytest.mark.heavy
def test_a_run_that_is_finished_in_use_or_not_there(compared, capsys, tmp_path):
    assert "is finished; there is nothing to resume" in mistake(capsys, "finetune", "--resume", compared[0])
    assert "is no run folder" in mistake(capsys, "finetune", "--resume", tmp_path)
    assert "is no run folder" in mistake(capsys, "evaluate", tmp_path)
    unfinished = shutil.copytree(compared[0], tmp_path / "run")
    (unfinished / "result.json").unlink()
    (unfinished / "weights.safetensors").unlink()
    assert "is not finished; go on with lbpwht finetune --resume" in mistake(capsys, "evaluate", unfinished)
    held = run_folder.lock(unfinished, create=False)
    code = "import sys; from lbpwht_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    other = subprocess.run([sys.executable, "-c", code, "finetune", "--resume", unfinished], capture_output=True, text=True)
    held.release()
    assert other.returncode == 2 and "is in use by another process; wait for it to end" in other.stderr
    # all but the end is done: weights and result are written again
    lbpwht(capsys, "finetune", "--resume", unfinished)
    for name in ("weights.safetensors", "result.json"):
        assert (unfinished / name).exists()
    assert read_metrics(unfinished) == read_metrics(compared[0])


def test_a_resumed_run_keeps_its_configuration(compared, some_digits, capsys):
    # a flag that contradicts the run is refused whether or not its value is the one it has in a new run by default
    full = compared[0] / "compare" / "full"
    for folder, arguments, message in (
        (compared[0], ["--lr", "1"], r"--lr 1\.0: the run in .* was started with 0\.\d+, and a resumed run keeps its config"),
        (
            compared[0],
            ["--model", "vit_tiny_patch16_224"],
            "--model vit_tiny_patch16_224: the run in .* was started with vit_m",
        ),
        (compared[0], ["--batch-size", "60"], "--batch-size 60: the run in .* was started with 24"),
        (compared[0], ["--crop-scale", "0.5", "1"], r"--crop-scale \(0\.5, 1\.0\): the run in .* was started with None"),
        (compared[0], ["--remat"], "--remat True: the run in .* was started with False"),
        (compared[0], ["--scan-blocks"], "--scan-blocks True: the run in .* was started with False"),
        (compared[0], ["--compare"], "--compare does not go with --resume"),
        (compared[0], ["--recipe", "default"], "--recipe does not go with --resume"),
        (full, ["--method", "lp_l1-4"], "--method lp_l1-4: the run in .* was started with full"),
        (full, ["--train", "all"], "--train all: the run in .* was started with last_stage"),
        # what agrees is accepted: it is only then that the run turns out to be finished
        (full, ["--method", "full", "--train", "last_stage", "--dataset", some_digits, "--when", "faster"], "is finished"),
        (full, ["--batch-size", "24", "--image-size", "28", "--pretrained", "bundled", "--flip", "False"], "is finished"),
    ):
        assert re.search(message, mistake(capsys, "finetune", "--resume", folder, *arguments)), arguments


def test_a_checkpoint_of_another_configuration(compared, capsys, tmp_path):
    other = shutil.copytree(compared[0], tmp_path / "run")
    (other / "result.json").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "method": "lora-2"}))
    message = mistake(capsys, "finetune", "--resume", other)
    assert f"config.json: method is 'lora-2', but checkpoint {STEPS} was made with '{METHOD}'; put it back, or start" in message
    (other / "config.json").write_text("{}")
    assert "no configuration of this version's" in mistake(capsys, "finetune", "--resume", other)


@pytest.mark.heavy
def test_a_signal_stops_and_saves_and_the_run_goes_on_bit_for_bit(few_digits, capsys, tmp_path):
    options = [
        "--dataset",
        few_digits,
        "--epochs",
        "2",
        "--batch-size",
        "24",
        "--method",
        "lora-4",
        "--lora-dropout",
        "0.2",
        "--train",
        "last_stage",
        "--ema",
        "0.5",
    ]
    options += ["--flip", "True", "--drop-path", "0.1", "--accumulate", "3", "--checkpoint-every", "4"]
    lbpwht(capsys, "finetune", *options, "--output", tmp_path / "whole")

    def interrupt():
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run")[0]) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["finetune", *options, "--output", str(tmp_path / "run")]) == 3
    thread.join()
    steps, _ = read_metrics(tmp_path / "run")
    done = len(steps)
    assert 1 <= done < 20
    message = f"stopped by SIGTERM after step {done} of 20, which is saved; go on with lbpwht finetune --resume"
    assert message in capsys.readouterr().err
    assert f"going on after step {done}" in lbpwht(capsys, "finetune", "--resume", tmp_path / "run")
    untimed = [
        [[event._replace(seconds=0) for event in steps], epochs]
        for steps, epochs in (read_metrics(tmp_path / name) for name in ("whole", "run"))
    ]
    assert untimed[0] == untimed[1]
    weights = [load_weights(tmp_path / name / "weights.safetensors")[0] for name in ("whole", "run")]
    chex.assert_trees_all_equal(*weights, strict=True)


def test_the_table_shows_every_method(compared):
    folder, printed = compared
    for method, path in folders(folder).items():
        result = json.loads((path / "result.json").read_text())
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {method} "))
        for value in (
            f"{result['test_accuracy']:.2%}",
            f"{result['backward_flops'] / 1e6:.1f}",
            f"{result['saved_bytes'] / 1e6:,.2f}",
        ):
            assert value in row
    assert str(folder) in printed


def test_low_rank_is_cheaper_than_full(compared):
    results = {m: json.loads((path / "result.json").read_text()) for m, path in folders(compared[0]).items()}
    for key in ("backward_flops", "saved_bytes"):
        assert results[METHOD][key] < results["full"][key]


@pytest.mark.heavy
def test_a_sum_on_the_last_stage(few_digits, tmp_path):
    method = "lp_l1-2+lora-4"
    arguments = ["--method", method, "--train", "last_stage", "--dataset", few_digits, "--epochs", "1", "--batch-size", "120"]
    assert main(["finetune", *arguments, "--output", str(tmp_path)]) == 0
    config, result = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "result"))
    assert (config["method"], config["train"]) == (method, "last_stage")
    # the last block but for its attention layers, their branches of rank 12 and 4, the last norm and the head
    block = 4 * 96 + 96 * 384 + 384 + 384 * 96 + 96 + 12 * (96 + 3 * 96) + 4 * (96 + 96)
    assert result["trainable_parameters"] == block + 2 * 96 + 96 * 10 + 10
    saved, start = load_weights(tmp_path / "weights.safetensors")[0]["params"], load_bundled()[0]["params"]
    for name in ("patch_embed", "pos_embed", *(f"blocks_{i}" for i in range(5))):
        chex.assert_trees_all_equal(saved[name], start[name], strict=True)
    # the adapter, on the pretrained weights, is the same model
    info, base = model_info(BUNDLED), create_model(BUNDLED, num_classes=10)
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    adapted = adapt(base, parse_method(method).rules(info, "last_stage"), images)
    loaded = load_adapter(tmp_path / "adapter", adapted, load_bundled()[0], BUNDLED)
    np.testing.assert_allclose(adapted.apply(loaded, images), base.apply({"params": saved}, images), rtol=1e-4, atol=1e-4)


def test_an_output_folder_is_never_overwritten(compared, capsys):
    before = (compared[0] / "metrics.jsonl").read_bytes()
    assert main(["finetune", "--output", str(compared[0])]) == 2
    assert "already holds a run; name another --output, continue it with --resume" in capsys.readouterr().err
    assert (compared[0] / "metrics.jsonl").read_bytes() == before
