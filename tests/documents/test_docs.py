"""The documents' Python examples run and their commands parse; ``docs/check.py`` checks the rest."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.execute import load

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


EXAMPLES = {page.name: blocks(page, "python") for page in PAGES if page.name not in ("api.md", "README.md")}
SHELL = [
    (page.name, shlex.split(line.rpartition(" && ")[2], comments=True)[1:])
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.rpartition(" && ")[2].startswith("lbpwht ")
]


HEAVY = {"compile.md": pytest.mark.heavy}  # a process of its own for each program


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=HEAVY.get(page, ())) for page, examples in EXAMPLES.items() if examples]
)
def test_the_examples_of_a_page_run_in_turn(page, capsys):
    names = {}
    for number, block in enumerate(EXAMPLES[page], 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_each_of_the_readmes_snippets_runs_as_pasted(number, capsys):
    exec(compile(blocks(ROOT / "README.md", "python")[number], f"README.md, example {number + 1}", "exec"), {})


@pytest.mark.parametrize(("page", "arguments"), SHELL, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_commands_parse(page, arguments):
    tyro.cli(load(COMMANDS[arguments[0]]), args=arguments[1:])
