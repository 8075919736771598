"""The documents: their examples run, their links lead somewhere, what is generated is what the sources say."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = {page.name: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE) for page in PAGES}


def load(path):
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
    assert load(DOCS / "make_api.py").render() == (DOCS / "api.md").read_text(), "run python docs/make_api.py"
