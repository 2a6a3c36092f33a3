"""Every Python block of the README and the guides runs, in order, in an empty folder."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_pc
from hf_pc.energies import ENERGIES
from hf_pc.output import OUTPUTS
from hf_pc.saving import SavingMixin
from hf_pc.solvers import SOLVERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: pages without Python of their own: tables, lists of commands, and what is made from docstrings
WITHOUT_CODE = {"models.md", "index.md", "benchmarks.md", "command_line.md", "api.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share a namespace and raise nothing; each page but those WITHOUT_CODE has one."""
    monkeypatch.chdir(tmp_path)
    for registry in (ENERGIES, OUTPUTS, SOLVERS):  # what a page registers is known to that page alone
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert bool(blocks) is (page.name not in WITHOUT_CODE)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


def test_the_figures_of_the_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/figures.py trains, draws what the pages show and prints what they quote; F falls, rules stand in order."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    figures = importlib.import_module("figures")
    monkeypatch.setattr(figures, "SWEEPS", (1, 3))
    monkeypatch.setattr(figures, "STRENGTHS", (0.1, 0.4))
    found = figures.main(["--steps", "8", "--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"run.png", "relaxation.png", "strength.png"}
    assert found["relaxation"]["free_energy"][0] > found["relaxation"]["free_energy"][1]
    assert found["relaxation"]["residual"][0] == pytest.approx(1)
    at_strong = [found["strength"]["distance"][rule][1] for rule in ("plain", "centred", "extrapolated")]
    assert at_strong == sorted(at_strong, reverse=True)


def test_the_site_builds(tmp_path: Path) -> None:
    """Every page is in the navigation, every link and every name of the API is found; a warning is an error."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        build, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert all(name in api for name in hf_pc.__all__)
    assert all(f'id="hf_pc.PCModel.{name}"' in api for name in vars(SavingMixin) if not name.startswith("_"))
    for page in (tmp_path / "site").glob("*.html"):  # nothing is fetched from elsewhere
        outside = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', page.read_text(encoding="utf-8"))
        assert not outside, (page.name, outside)


def test_pages_that_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide of a part that is not always there joins the navigation once, where it exists."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    hook = importlib.import_module("optional_pages")
    config = {"docs_dir": str(tmp_path), "nav": [{"Start": ["index.md"]}, {"Guides": ["hub.md"]}]}
    assert hook.on_config(config)["nav"][1] == {"Guides": ["hub.md"]}
    (tmp_path / "distributed.md").write_text("# Distributed\n")
    for _ in range(2):
        assert hook.on_config(config)["nav"][1] == {"Guides": ["hub.md", "distributed.md"]}
