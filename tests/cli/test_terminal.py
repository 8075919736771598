"""Each command's screen in a real pseudo-terminal of 80 and 120 columns: nothing is cut, nothing is wider than the terminal."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics
from terminal import terminal

from lbpwht_jax.bench import layers as bench_layers
from lbpwht_jax.bench import step as bench_step
from lbpwht_jax.bench.layer import LayerRow
from lbpwht_jax.bench.model_steps import StepRow
from lbpwht_jax.cli import main
from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.run_flags import RunFlags
from lbpwht_jax.compile.report import table as compile_table
from lbpwht_jax.compile.request import Row
from lbpwht_jax.data import Loading, evaluation_batches, open_dataset
from lbpwht_jax.runs import folder as run_folder
from lbpwht_jax.runs.finished import load_run
from lbpwht_jax.runs.results import Result, table
from lbpwht_jax.screen import console, show
from lbpwht_jax.train import normalise
from lbpwht_jax.weights import save_weights
from lbpwht_jax.weights.files import bundled_file

MICRO = "vit_micro_patch4_28"
WIDTHS = pytest.mark.parametrize("columns", [80, 120])
SUMS = ("full", "lp_l1-4+lora_all-8", "lp_linf-8")


def screen(columns, *arguments, code=0):
    """The lines that a command shows."""
    with terminal(columns) as recording:
        try:
            found = main(list(map(str, arguments)))
        except SystemExit as left:  # after --help
            found = left.code
    assert found == code, recording.raw
    return checked(recording, columns)


def checked(recording, columns):
    """The lines, none of which may be cut or wider than the terminal."""
    assert "…" not in recording.raw
    longest = max((line for line in recording.lines if not line.startswith("usage:")), key=len)
    assert len(longest) <= columns, longest
    return recording.lines


@WIDTHS
@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, columns):
    lines = screen(columns, name, "--help")
    text = " ".join(lines)
    assert lines[0].startswith(f"usage: lbpwht {name}")
    assert not re.search(r"\{None|None\}|\(default: None\)", text)
    assert len(screen(columns, "--help")) < 24


@WIDTHS
def test_models(columns):
    lines = screen(columns, "models")
    for name, count in (("vit_large_patch16_224", "304,326,632"), ("deit_small_distilled_patch16_224", "22,436,432")):
        assert any(name in line and count in line for line in lines)


@pytest.mark.heavy
def test_cost_by_layer():
    text = "\n".join(screen(80, "cost", MICRO, "--method", "lp_l1-4+lora_all-8", "--per-layer"))
    assert "blocks_5/mlp/fc2" in text and "MB kept per image" in text and "speed-up" not in text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has ended, without any training: its configuration, and random weights."""
    folder = tmp_path_factory.mktemp("run")
    config = RunFlags(method="full").new_run(None)[0]
    (folder / run_folder.CONFIG).write_text(json.dumps(config.to_json()))
    variables = config.module().init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))
    save_weights(folder / run_folder.WEIGHTS, variables, {"model": MICRO, "classes": config.classes})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three images and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        Image.fromarray(np.full((8, 8), 80 * number, np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    return folder


@WIDTHS
def test_predict(columns, run, images):
    text = "\n".join(screen(columns, "predict", run, images))
    assert [f"{number}.png" in text for number in range(3)] == [True] * 3
    assert "cannot read the image" in text and "broken.png" in text


def test_evaluate(run, tmp_path):
    """Counts by class against scikit-learn's, from the logits of all test images at once."""
    text = "\n".join(screen(80, "evaluate", run, "--output", tmp_path / "found"))
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())
    loaded, dataset = load_run(run), open_dataset("digits")
    loading = Loading(360, 28, 1)
    with evaluation_batches(dataset.test, loading, loaded.config.crop) as batches:
        batch = next(batches)
    images = normalise(batch.images.astype(np.float32) / np.float32(255), loaded.config.info)
    logits = np.asarray(jax.jit(loaded.module.apply)(loaded.variables, images))
    matrix = metrics.confusion_matrix(batch.labels, logits.argmax(1), labels=range(10))
    assert found["confusion"] == matrix.tolist()
    assert found["top5_accuracy"] == metrics.top_k_accuracy_score(batch.labels, logits, k=5, labels=range(10))
    assert [row["images"] for row in found["classes"]] == matrix.sum(1).tolist()
    assert [row["accuracy"] for row in found["classes"]] == (matrix.diagonal() / matrix.sum(1)).tolist()
    assert found["loss"] == pytest.approx(metrics.log_loss(batch.labels, jax.nn.softmax(logits)), rel=1e-4)
    assert f"digits, test: accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}, 360 images" in text
    assert "most often taken for" in text
    with Image.open(tmp_path / "found" / "confusion.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


@WIDTHS
def test_export(columns, run, tmp_path):
    screen(columns, "export", run, tmp_path / "a.safetensors")
    text = " ".join(screen(columns, "export", run, tmp_path / "a.pth", code=2))
    assert "only .safetensors files are written; name it a.safetensors" in re.sub(r"\s+", " ", text)


def test_convert(tmp_path):
    with bundled_file() as source:
        lines = screen(80, "convert", MICRO, source, tmp_path / "a.safetensors")
    assert " ".join(" ".join(lines).split()).endswith(f"{MICRO} for 10 classes at 28 pixels, flax layout")


@pytest.mark.heavy
def test_bench(tmp_path):
    short = ["--rounds", "1", "--output", tmp_path]
    lines = screen(80, "bench", "step", "--models", MICRO, "--methods", "full", "lp_l1-2", "--batch-size", "2", *short)
    text = " ".join(" ".join(lines).split())
    assert "lp_l1-2: compiled, first loss" in text and "24 low-rank, 0 exact by choice, 0 exact for speed" in text
    found = json.loads((tmp_path / "step.json").read_text())["rows"]
    for row in found:
        cells = [row["method"], f"{1e3 * row['seconds']:.0f}", f"{row['speedup']:.2f}", f"{row['saved_bytes'] / 1e6:.1f}"]
        # what all rows have alike stands below the table, such as the same time
        assert any(all(f" {cell} " in line or f": {cell};" in text for cell in cells) for line in lines)
    lines = screen(80, "bench", "layers", "--only", "stages", "--ranks", "2", "--batch", "1", *short)
    found = json.loads((tmp_path / "layers.json").read_text())["rows"]
    for row in found:
        assert any(
            line.startswith(f"{row['inputs']}->{row['outputs']} ") and f"{row['speedup']:.2f}x" in line for line in lines
        )


@pytest.mark.heavy
def test_compile():
    lines = screen(80, "compile", MICRO, "--methods", "full", "lp_l1-2", "lora-8", "--batch-size", "8")
    text = " ".join(" ".join(lines).split())
    assert f"{MICRO} on cpu:1, 8 images a step; numbers of one chip" in text and "temporaries" in text
    assert "lp_l1-2: all; 24 low-rank, 0 exact by choice, 0 exact for speed" in text
    assert "lora-8: head; 0 low-rank, 12 exact by choice, 0 exact for speed, 12 frozen" in text


def finetune_table():
    return table([Result(name, 0.987654, 123_456_789, 12_345_678_901, 123_456_789, 1.2345) for name in SUMS])


def step_table():
    counts = (12.5, 5.1, 1.0, 10**11, 10**8, 10**10)
    return bench_step._table([StepRow("swinv2_base_window16_256", f"{name}+remat", "all", 64, *counts) for name in SUMS])


def layers_table():
    times = (123.456, 12.345, 10.0, 21.3, 0.47, 9.8, 1.3, 456.7, 11.2, 1e-6)
    return bench_layers._table([LayerRow(1792, 448, (56, 56), 64, r, *times) for r in (2, 8)])


def compiled_table():
    return compile_table([Row("vit_base_patch16_224", name, "v5e:16x16", 16384, *[10**10] * 8) for name in SUMS], True)


@WIDTHS
@pytest.mark.parametrize("made", [finetune_table, step_table, layers_table, compiled_table])
def test_tables_of_numbers(columns, made):
    with terminal(columns) as recording:
        show(console(), made())
    lines = checked(recording, columns)
    shown = made()
    for column in shown.columns:
        for cell in column.cells:
            if column.justify == "right":
                assert any(str(cell) in line for line in lines), cell
