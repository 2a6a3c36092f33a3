"""What surrounds the package: workflows, citation, versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_pc

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def valid(schema: str, *paths: Path) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, paths)]
    done = subprocess.run(check, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_and_citation_follow_their_schemas() -> None:
    """Each workflow is one that the service takes, with a limit on its time; so is the citation."""
    assert {path.stem for path in WORKFLOWS} == {"tests", "lint", "docs", "release"}
    valid("vendor.github-workflows", *WORKFLOWS)
    valid("custom.github-workflows-require-timeout", *WORKFLOWS)
    valid("vendor.citation-file-format", ROOT / "CITATION.cff")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_safe_and_call_what_is_there(path: Path) -> None:
    """No workflow puts an expression into a shell, each names its permissions, and the targets it makes exist."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            script = step.get("run", "")
            assert "${{" not in script
            for made in re.findall(r"^make (.+)$", script, flags=re.MULTILINE):
                assert set(made.split()) <= targets


def test_the_oldest_versions_are_those_that_are_promised() -> None:
    """The job with the oldest versions installs the lower bounds of pyproject.toml."""
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    versions = {row["name"]: row for row in tests["jobs"]["versions"]["strategy"]["matrix"]["include"]}
    assert set(versions) == {"oldest", "newest"}
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", given).groups() for given in PROJECT["dependencies"])  # type: ignore[union-attr]
    for pin in versions["oldest"]["libraries"].split():
        name, version = pin.removesuffix(".*").split("==")
        assert bounds[name] == version
    assert versions["oldest"]["python"] == PROJECT["requires-python"].removeprefix(">=")


def test_one_version_everywhere() -> None:
    """Package, project, citation and change log name the same version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert hf_pc.__version__ == PROJECT["version"] == citation["version"]
    assert f"## {hf_pc.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
