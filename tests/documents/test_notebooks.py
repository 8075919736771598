"""The notebooks run from top to bottom, and are committed with what they show."""

import warnings
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORGET = "%reset -f"


def printed(notebook):
    """What each code cell shows: the kinds of its outputs, and its text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source != FORGET]
    kinds = [[output.output_type for output in cell.outputs] for cell in cells]
    return kinds, [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():  # jupyter_client and zmq warn about themselves
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def kernel():
    """One process for all notebooks, which import the same packages; each begins with an empty namespace."""
    manager = AsyncKernelManager()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["adapt_your_model", "choose_ranks", "how_it_works", "quickstart"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_is_committed(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    expected_kinds, expected_text = printed(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FORGET))
    client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    client.kc.stop_channels()
    kinds, text = printed(notebook)
    assert kinds == expected_kinds
    assert text[0] == expected_text[0]  # the first are tables and shapes; losses differ in their last digits between machines
