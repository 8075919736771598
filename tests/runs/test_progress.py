import io
import types

from rich.console import Console

from lbpwht_jax.runs import progress
from lbpwht_jax.runs.progress import Reporter
from lbpwht_jax.train import Epoch, Recipe, Step

TRAINER = types.SimpleNamespace(steps=20, steps_per_epoch=10, recipe=Recipe(epochs=2, batch_size=8))


def shown(terminal, monkeypatch, line_every=0.0):
    monkeypatch.setattr(progress, "_LINE_EVERY", line_every)
    text = io.StringIO()
    with Reporter(Console(file=text, force_terminal=terminal, width=160), TRAINER, 11, [0.9]) as reporter:
        for number, loss in ((12, 0.5), (13, 0.5), (14, 0.1)):
            reporter.show(Step(number, loss, 0.75, 1.0, 0.25))
        reporter.show(Epoch(2, 20, 0.9, 0.3))
    return text.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    lines = shown(False, monkeypatch).splitlines()
    assert lines[1].startswith("epoch 2/2, step 13/20: loss 0.500, accuracy 75.0%, 32 images/s, ")
    assert lines[1].endswith(" MiB, 0:00:02 to go")
    # the mean of the epoch's steps, those before the run went on among them
    assert lines[-1].startswith("epoch 2/2: training loss 0.500, test loss 0.300, test accuracy 90.00%, 32 images/s, ")
    assert len(shown(False, monkeypatch, 60.0).splitlines()) == 1


def test_a_bar_on_a_terminal(monkeypatch):
    text = shown(True, monkeypatch)
    assert "14/20" in text and "32 images/s" in text and "\x1b[" in text
    assert "to go" not in text
