import contextlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from lbpwht_jax import adapt
from lbpwht_jax.adapter_file import load_adapter
from lbpwht_jax.cli import main
from lbpwht_jax.data.arrays import digits
from lbpwht_jax.methods import parse_method
from lbpwht_jax.models import create_model, model_info
from lbpwht_jax.train import evaluate, make_eval_step
from lbpwht_jax.weights import BUNDLED, load_bundled, load_weights


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A short run beside full backpropagation and LP_{L1-2}: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["finetune", "--epochs", "3", "--compare", "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def folders(folder):
    return {"lp_l1-4": folder, "full": folder / "compare" / "full", "lp_l1-2": folder / "compare" / "lp_l1-2"}


def test_the_run_folder_is_complete(compared):
    for method, folder in folders(compared[0]).items():
        config = json.loads((folder / "config.json").read_text())
        assert config["method"] == method and config["dataset"] == "digits"
        assert config["recipe"]["epochs"] == 3
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["number"] for line in lines if line["kind"] == "step"] == list(range(1, 67))
        accuracies = [line["test_accuracy"] for line in lines if line["kind"] == "epoch"]
        assert len(accuracies) == 3
        assert json.loads((folder / "result.json").read_text())["test_accuracy"] == accuracies[-1]
        with Image.open(folder / "curves.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5


def test_the_weights_rebuild_the_model(compared):
    variables, metadata = load_weights(compared[0] / "weights.safetensors")
    model = create_model(metadata["model"], num_classes=len(metadata["classes"]))
    step = make_eval_step(model, model_info(metadata["model"]))
    accuracy, _ = evaluate(step, variables, digits(28, 0).test, 64)
    assert accuracy == json.loads((compared[0] / "result.json").read_text())["test_accuracy"]
    # three of fifteen epochs: far from chance, short of the end
    assert accuracy > 0.5


def test_the_table_shows_every_method(compared):
    folder, printed = compared
    for method, path in folders(folder).items():
        result = json.loads((path / "result.json").read_text())
        row = next(line for line in printed.splitlines() if line.startswith(f"│ {method} "))
        for value in (
            f"{result['test_accuracy']:.2%}",
            f"{result['backward_flops'] / 1e6:.1f}",
            f"{result['saved_bytes'] / 1e3:,.0f}",
        ):
            assert value in row
    assert str(folder) in printed


def test_low_rank_is_cheaper_than_full(compared):
    results = {m: json.loads((path / "result.json").read_text()) for m, path in folders(compared[0]).items()}
    for key in ("backward_flops", "saved_bytes"):
        assert results["lp_l1-2"][key] < results["lp_l1-4"][key] < results["full"][key]


def test_a_sum_on_the_last_stage(tmp_path):
    method = "lp_l1-2+lora-4"
    arguments = ["--method", method, "--train", "last_stage", "--epochs", "1", "--output", str(tmp_path)]
    assert main(["finetune", *arguments]) == 0
    config, result = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("config", "result"))
    assert (config["method"], config["train"]) == (method, "last_stage")
    # the last block but for its attention layers, their branches of rank 12 and 4, the last norm and the head
    block = 4 * 96 + 96 * 384 + 384 + 384 * 96 + 96 + 12 * (96 + 3 * 96) + 4 * (96 + 96)
    assert result["trainable_parameters"] == block + 2 * 96 + 96 * 10 + 10
    saved, start = load_weights(tmp_path / "weights.safetensors")[0]["params"], load_bundled()[0]["params"]
    for name in ("patch_embed", "pos_embed", *(f"blocks_{i}" for i in range(5))):
        jax.tree.map(np.testing.assert_array_equal, saved[name], start[name])
    # the adapter, on the pretrained weights, is the same model
    info, base = model_info(BUNDLED), create_model(BUNDLED, num_classes=10)
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 1)).astype(np.float32)
    adapted = adapt(base, parse_method(method).rules(info, "last_stage"), images)
    loaded = load_adapter(tmp_path / "adapter", adapted, load_bundled()[0], BUNDLED)
    np.testing.assert_allclose(adapted.apply(loaded, images), base.apply({"params": saved}, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "lp_l1"], "unknown method 'lp_l1'; write full, lp_l1-R or lp_linf-R"),
        (["--method", "lp_l1-0"], "lp_l1: r must be from 1 to 15"),
        (["--method", "lp_linf-9"], "lp_linf: r must be from 1 to 8"),
        (["--method", "lora-8+lora_all-8"], "method 'lora-8+lora_all-8' names two of a kind; write full, lp_l1-R"),
        (["--train", "head"], "training the head alone leaves low-rank backpropagation no layer"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--lr", "-1"], "--lr must be positive, got -1.0"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--batch-size", "5000"], "--batch-size must be at most 1437, the number of training images"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--output", "/proc/run"], "cannot write the run folder /proc/run: "),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_output_folder_is_never_overwritten(compared, capsys):
    before = (compared[0] / "metrics.jsonl").read_bytes()
    assert main(["finetune", "--output", str(compared[0])]) == 2
    assert "already holds a run; name another --output, or delete it" in capsys.readouterr().err
    assert (compared[0] / "metrics.jsonl").read_bytes() == before


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["finetune", "--output", str(tmp_path / "file")]) == 2
    assert "cannot write the run folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    for option in ("method", "projection", "epochs", "batch-size", "lr", "seed", "output", "compare", "train"):
        assert f"--{option}" in text
    assert "lp_linf-R" in text and "Run folder" not in text
