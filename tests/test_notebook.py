"""The notebook runs from its first cell to its last, and what is stored of it names no folder of its author's."""

import os
import re
import sys
from collections.abc import Iterator

import nbformat
import pytest
from command import ROOT
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = ROOT / "notebooks/inside_a_step.ipynb"
MAX_BYTES = 300_000
# A folder and something in it, from the root or a home; a URL, a relative path or `\boxed` is none.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])~?/[\w.-]+/[\w.-]+|\b[A-Z]:\\\w")


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """A kernel of the very environment that runs the tests, whatever kernels the user has installed."""
    write_kernel_spec(tmp_path / "kernels/python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nor the user's start-up files
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # another test's backend would draw no figures here
    return "python3"


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that the outputs say: streams, plain results and tracebacks, but not the pictures."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from output.get("traceback", [])
            yield from (str(data) for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def pictures(notebook: NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_it_runs(notebook, kernel, tmp_path):
    drawn = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(
        notebook, timeout=1200, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert pictures(notebook) == drawn > 0
    said = "\n".join(texts(notebook))
    assert "largest difference between packed and alone" in said and "expected reward" in said


def test_what_is_stored_is_small_whole_and_names_no_folder(notebook):
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "stored from a partial run"
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in code for output in c.outputs
    )
    for text in texts(notebook):
        assert not (found := ABSOLUTE_PATH.search(text)), found
        assert sys.prefix not in text
