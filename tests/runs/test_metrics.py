import json
import resource
import threading

import pytest

from lbpwht_jax.runs.metrics import MetricsFile, read_metrics
from lbpwht_jax.train import Epoch, Step

EVENTS = [Step(1, 2.5, 0.25, 3.0, 0.5), Step(2, 2.25, 0.5, 2.0, 0.25), Epoch(1, 2, 0.75, 1.5), Step(3, 2.0, 0.5, 1.0, 0.25)]


def test_lines_and_boards_are_written(tmp_path):
    with MetricsFile(tmp_path, 8) as metrics:
        for event in EVENTS:
            metrics.write(event)
        metrics.sync()
        assert read_metrics(tmp_path) == ([EVENTS[0], EVENTS[1], EVENTS[3]], [EVENTS[2]])
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first == {"kind": "step", "number": 1, "loss": 2.5, "accuracy": 0.25, "gradient_norm": 3.0, "seconds": 0.5}
    board = b"".join(file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())
    for tag in (b"loss", b"accuracy", b"gradient_norm", b"images_per_second", b"test_loss", b"test_accuracy"):
        assert tag in board


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    with MetricsFile(tmp_path, 8) as metrics:
        for event in EVENTS:
            metrics.write(event)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "numb')  # a process killed while writing
    assert read_metrics(tmp_path)[0][-1].number == 3
    with MetricsFile(tmp_path, 8, done=2) as metrics:
        metrics.write(EVENTS[3])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["number"]) for line in lines] == [("step", 1), ("step", 2), ("epoch", 1), ("step", 3)]


def test_processes_that_leave_the_writing_to_the_first(tmp_path):
    with MetricsFile(tmp_path, 8, write=False) as metrics:
        metrics.write(EVENTS[0])
        metrics.sync()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_disk_that_is_full_is_an_error_and_prints_nothing(limit, tmp_path, capfd):
    # the lower limit stops the first line, the higher one TensorBoard's file, which is written in larger pieces
    threads, limits = threading.active_count(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(tmp_path, 8) as metrics:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                for _ in range(100):
                    metrics.write(EVENTS[0])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")
