"""Checks the documents without running their examples, which ``tests/documents`` does.

    python docs/check.py

The README is short, links lead to files, the index has every page, examples import public names only, the version is the same
everywhere, CI runs the commands that the README promises, and generated pages are what their generators write.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS, README, CHANGELOG = ROOT / "docs", ROOT / "README.md", ROOT / "CHANGELOG.md"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGE = "lbpwht_jax"
README_LINES = 119
COMMANDS = ("pip install -e '.[train]' && lbpwht finetune", "pip install -e '.[test]' && pytest")


def length() -> Iterator[str]:
    """The README fits on one screen after another, not more."""
    if (lines := len(README.read_text().splitlines())) > README_LINES:
        yield f"README.md has {lines} lines, more than {README_LINES}"


def links() -> Iterator[str]:
    """Links lead to files, every page is in the index, and every picture is shown."""
    for page in [*PAGES, README, CHANGELOG]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                yield f"{page.name} links to {target}, which is not there"
    linked = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text()))
    for name in sorted({page.name for page in PAGES} - {"index.md"} - linked):
        yield f"docs/index.md has no link to {name}"
    shown = set(re.findall(r"\]\((images/[^)]+)\)", (DOCS / "results.md").read_text()))
    for picture in sorted((DOCS / "images").glob("*.png")):
        if f"images/{picture.name}" not in shown:
            yield f"docs/results.md does not show {picture.name}"


def sources() -> Iterator[tuple[str, str]]:
    """The Python code of pages and notebooks, each piece with its place."""
    fence = re.compile(r"^```(?:python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for page in [*PAGES, README]:
        for number, block in enumerate(fence.findall(page.read_text()), 1):
            if page.name != "api.md":
                yield f"{page.name}, example {number}", block
    for notebook in NOTEBOOKS:
        for number, cell in enumerate(json.loads(notebook.read_text())["cells"], 1):
            if cell["cell_type"] == "code":
                yield f"{notebook.name}, cell {number}", "".join(cell["source"])


def imports() -> Iterator[str]:
    """Examples import from the package and from its folders, and only names that these export."""
    for where, code in sources():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith(f"{PACKAGE}."):
                        yield f"{where}: write 'from {PACKAGE}.ROOM import NAME', not 'import {alias.name}'"
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
                public = getattr(importlib.import_module(node.module), "__all__", ()) if node.module.count(".") < 2 else ()
                for alias in node.names:
                    if alias.name not in public:
                        yield f"{where}: {node.module}.{alias.name} is not a public name"


def versions() -> Iterator[str]:
    """pyproject.toml, CITATION.cff and CHANGELOG.md name the same version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if f"\nversion: {version}\n" not in (ROOT / "CITATION.cff").read_text():
        yield f"CITATION.cff does not have version {version}"
    if f"\n## {version}\n" not in CHANGELOG.read_text():
        yield f"CHANGELOG.md has no section {version}"


def commands() -> Iterator[str]:
    """The README has its two commands, and CI tests as it says."""
    for command in COMMANDS:
        if f"\n{command}\n" not in README.read_text():
            yield f"README.md lacks the line: {command}"
    if f"\n{COMMANDS[1]}\n" not in (ROOT / ".ci" / "run").read_text():
        yield f".ci/run lacks the line: {COMMANDS[1]}"
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    for part in ("pip install -e '.[test]'", "- run: pytest\n"):
        if part not in workflow:
            yield f".github/workflows/checks.yml lacks: {part.strip()}"


def generated() -> Iterator[str]:
    """api.md, results.md, accelerators.md and the README's figures are what their generators write."""
    pages = [ROOT / "experiments" / f"{name}.py" for name in ("results_page", "accelerator_page")]
    for generator in (DOCS / "make_api.py", *pages):
        done = subprocess.run([sys.executable, generator, "--check"], capture_output=True, text=True)
        if done.returncode:
            yield done.stderr.strip() or f"{generator.name} ended with {done.returncode}"


def main() -> None:
    """Runs every check and lists what is wrong."""
    checks = (length, links, imports, versions, commands, generated)
    wrong = [text for check in checks for text in check()]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(PAGES)} pages, the README and {len(NOTEBOOKS)} notebooks are in order")


if __name__ == "__main__":
    main()
