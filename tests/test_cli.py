"""`hf-pc nodes` on local configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_invariants import make

from hf_pc.cli import main


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nodes_lists_the_blocks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per block, with module, shape per token, energy and precision; only config.json is needed."""
    make(name).config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path), "--precision", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    assert all(row["shape"] == [32] and row["energy"] == "gaussian" and row["precision"] == "4" for row in rows)


def test_nodes_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a person reads a table."""
    make("gpt2").config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "transformer.h.2" in shown
    assert "3 nodes" in shown


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown preset and a missing model are one line each and status 2."""
    make("gpt2").config.save_pretrained(tmp_path)
    for arguments in ([str(tmp_path), "--nodes", "blok"], [str(tmp_path / "none")]):
        assert main(["nodes", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hf-pc: ")
        assert error.count("\n") == 1
