"""The notebooks, run anew from top to bottom."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A directory that the notebooks, copied into ``notebooks/``, run in one after the other."""
    folder = tmp_path_factory.mktemp("workplace") / "notebooks"
    folder.mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, folder)
    return folder


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["01_tour", "02_what_it_sees", "03_sweeps"]


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_a_notebook_runs(name, workplace):
    notebook = nbformat.read(workplace / name, as_version=4)
    expected = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": workplace}}).execute()
    pictures = [
        any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])) for cell in notebook.cells
    ]
    assert sum(pictures) >= 2
    for cell, before in zip(notebook.cells, expected, strict=True):
        if cell.cell_type == "code":  # what is kept is what comes out
            assert {output.output_type for output in cell.outputs} == set(before), cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs_are_small(path):
    assert path.stat().st_size < 400_000
