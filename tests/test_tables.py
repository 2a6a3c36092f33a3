"""The tables of the pages are what the recorded results say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("tables")


def test_every_page_shows_the_results(tables: Any) -> None:
    """No figure of a table was changed by hand, and every recorded result is shown somewhere."""
    assert tables.main(["--check"]) == []
    pages = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert all(f"<!-- table: {path.stem} -->" in pages for path in tables.RESULTS.iterdir())


def test_a_changed_result_changes_its_page(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages follow the results, with the machine below; --check then names the page, and changes nothing."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", results)
    readme = tmp_path / "README.md"
    before = "# A\n<!-- table: state_memory -->\n<!-- end of table -->\nafter\n"
    readme.write_text(before)
    line = '{"model": "gpt2", "layers": 24, "hidden": 128, "sequence": 8, "sweeps": 3, "memory_ratio": 0.281'
    line += ', "relaxed_fraction": 0.00057, "residual": 0.53986'
    (results / "state_memory.jsonl").write_text(line + ', "machine": "a toaster"}\n')
    with pytest.raises(ValueError, match=r"would change README\.md"):
        tables.main(["--check"])
    assert readme.read_text() == before
    assert tables.main([]) == [readme]
    assert "| gpt2 | 24 | 128 | 8 | 3 | 0.28 | 0.0006 | 0.5399 |\n\nMachine: a toaster.\n" in readme.read_text()
    assert readme.read_text().endswith("<!-- end of table -->\nafter\n")
    assert tables.main(["--check"]) == []
    (results / "state_memory.jsonl").write_text(line + "}\n")
    with pytest.raises(ValueError, match=r"state_memory\.jsonl has a line without 'machine'"):
        tables.main([])
    (results / "state_memory.jsonl").write_text('{"model": "gpt2"}\n')
    with pytest.raises(ValueError, match=r"state_memory\.jsonl has a line without 'layers'"):
        tables.main([])
    readme.write_text(before.replace("state_memory", "no-such"))
    with pytest.raises(ValueError, match="'no-such'; allowed: step_cost"):
        tables.main([])


def test_seeds_become_one_row(tables: Any) -> None:
    """Lines that differ in their seed are one: perplexities by seed, the mean regime, the first seed's validation."""
    common = {"method": "plain", "learning_rate": 0.1, "regime": "equilibrium", "machine": "a toaster"}
    lines = [
        common | {"seed": seed, "test_perplexity": 5.0 + seed, "relaxed_fraction": 0.1, "residual": residual}
        | ({"validation_loss": 1.5} if seed == 0 else {})
        for seed, residual in ((1, 0.1), (0, 0.02))
    ]  # fmt: skip
    alone = common | {"method": "backprop", "seed": 0, "test_perplexity": 5.0, "validation_loss": 1.4}
    alone.pop("regime")
    first, second = tables.over_seeds([*lines, alone])
    assert first == alone | {"perplexities": [5.0]}
    assert second["perplexities"] == [5.0, 6.0]
    assert second["validation_loss"] == 1.5
    assert (second["residual"], second["regime"]) == (pytest.approx(0.06), "relaxing")
