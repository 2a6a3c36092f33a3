"""The notebook runs from top to bottom in an empty folder."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    """No cell raises; energies fall, one sweep is backprop, and a picture is shown. It is kept without outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
    assert "1 sweep: cosine 1.000000, length over backprop's 1.0000" in printed
    assert printed.index("PC: perplexity") < printed.index("backprop: perplexity")
    assert any("image/png" in output.get("data", {}) for output in outputs)
