"""The documents: their examples run, their links lead somewhere, what is generated is what the sources say."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import results_page
import tyro

from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.execute import load

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = {page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page, blocks in EXAMPLES.items() if blocks and page != "api.md"])
def test_the_examples_of_a_page_run_in_turn(page, capsys):
    names = {}
    for number, block in enumerate(EXAMPLES[page], 1):
        exec(compile(block, f"{page}, example {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES + [ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_the_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text()))
    assert linked == {page.name for page in PAGES} - {"index.md"}


def test_the_api_page_is_what_the_docstrings_say():
    assert module_at(DOCS / "make_api.py").render() == (DOCS / "api.md").read_text(), "run python docs/make_api.py"


def test_the_results_page_is_what_was_measured():
    assert results_page.render() == (DOCS / "results.md").read_text(), "run python experiments/results_page.py"


def test_the_pictures_are_there_with_their_results():
    shown = re.findall(r"!\[[^]]*\]\((images/[^)]+)\)", (DOCS / "results.md").read_text())
    assert sorted(shown) == sorted(f"images/{path.name}" for path in (DOCS / "images").glob("*.png"))


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_the_tests_as_the_readme_says():
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    assert "pip install -e '.[test]'" in workflow and "- run: pytest\n" in workflow


SHELL = [
    (page.name, shlex.split(line)[1:])
    for page in PAGES
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("lbpwht ")
]


@pytest.mark.parametrize(("page", "arguments"), SHELL, ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_the_commands_parse(page, arguments):
    tyro.cli(load(COMMANDS[arguments[0]]), args=arguments[1:])
