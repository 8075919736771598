"""Files of a run after accidents that hypothesis draws: they are read as far as they go, or named."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from lbpwht_jax.runs.config import RunConfig
from lbpwht_jax.runs.folder import add_skipped, read_config
from lbpwht_jax.runs.metrics import MetricsFile, read_lines
from lbpwht_jax.train import Epoch, Recipe, Step

EVENTS = [Step(1, 2.5, 0.25, 3.0, 0.5), Step(2, 2.25, 0.5, 2.0, 0.25), Epoch(1, 2, 0.75, 1.5), Step(3, 2.0, 0.5, 1.0, 0.25)]
CONFIG = RunConfig(
    *("vit_micro_patch4_28", "bundled", 28, 1, (0.5,), (0.5,), "bicubic", 1.0, "digits", None, ("zero", "one")),
    *("lp_l1-4", "all", "fitted", "faster", "float32", False, Recipe(2)),
)


@st.composite
def damaged(draw, data):
    """The bytes after one to three accidents: a flipped bit, a new piece, an end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "piece", "cut"]))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif kind == "piece":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8) | st.just(b"\0")) + data[at + draw(st.integers(0, 8)) :]
        else:
            data = data[:at]
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with MetricsFile(folder, 8) as metrics:
        for event in EVENTS:
            metrics.write(event)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json(), indent=2))
    return folder


@hypothesis.given(data=st.data())
def test_metrics(run, data):
    """Every whole line that can still be read is read, every other one is named by its number."""
    file = run / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(data.draw(damaged(before)))
    try:
        lines = read_lines(run)
        whole = file.read_bytes().count(b"\n")
        assert len(lines.steps) + len(lines.epochs) + len(lines.damage) == whole
        untouched = sum(line in file.read_bytes().split(b"\n")[:-1] for line in before.split(b"\n")[:-1])
        assert len(lines.steps) + len(lines.epochs) >= untouched
        assert all(message.startswith("line ") for message in lines.damage)
    finally:
        file.write_bytes(before)


@hypothesis.given(data=st.data())
def test_configurations(run, data):
    """It is a configuration, or one line says which file it is and what is wrong."""
    file = run / "config.json"
    before = file.read_bytes()
    file.write_bytes(data.draw(damaged(before)))
    try:
        assert isinstance(read_config(run), RunConfig)
    except ValueError as error:
        assert str(error).startswith(f"{file}: no configuration of this version's: ")
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("text", [b"\0", b"[1]", b"[" * 100_000, b"5", b"\xff"])
def test_a_list_of_skipped_images_that_is_damaged_is_kept_aside(text, tmp_path):
    (tmp_path / "skipped.json").write_bytes(text)
    assert add_skipped(tmp_path, {"a.png": "cut off"}) == {"a.png": "cut off"}
    assert json.loads((tmp_path / "skipped.json").read_text()) == {"a.png": "cut off"}
    assert (tmp_path / "skipped.json.damaged").read_bytes() == text
