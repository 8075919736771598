"""Tables keep every name and number at any width."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from lbpwht_jax.screen import console, say, show

NAMES = ("stages_3/blocks_11/token_mixer/talking_head1/conv", "lp_l1-4+lora_all-8")


def table(columns=6):
    made = Table(title="a title")
    made.add_column("name")
    for number in range(columns):
        made.add_column(f"heading number {number}", justify="right")
    made.add_column("same", justify="right")
    for name in NAMES:
        made.add_row(name, *(f"{(number + 1) * 123_456 * len(name):,}" for number in range(columns)), "float32")
    return made


@pytest.mark.parametrize("width", [60, 80, 120, 400])
@pytest.mark.parametrize("columns", [1, 3, 6, 9])
def test_nothing_is_cut(width, columns):
    text = io.StringIO()
    show(Console(file=text, width=width), table(columns))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in text.getvalue()
    # a folded name goes on in the next line of its cell
    shown = re.sub(r"[^\w,/+\-.]", "", "".join(line.split("│")[1] if "│" in line else line for line in lines))
    for name in NAMES:
        assert name in shown
    for number in range(columns):
        for name in NAMES:
            assert f"{(number + 1) * 123_456 * len(name):,}" in text.getvalue()
    assert "float32" in text.getvalue()


def test_a_pipe_has_any_width(capsys):
    show(console(), table(20))
    say(console(), "word " * 100)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(name in line for line in lines) for name in NAMES)
    assert lines[-1].count("word") == 100
