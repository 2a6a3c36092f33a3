"""What surrounds the package: workflows, citation, versions, the lock file."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    """Each requirement of the lock and its hashes, by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    split: list[list[str]] = [re.split(r"\s+--hash=", line.strip()) for line in lines if line]
    found = {
        str(canonicalize_name(Requirement(stated).name)): (Requirement(stated), hashes) for stated, *hashes in split
    }
    assert len(found) == len(split)
    return found


def test_the_lock_has_an_exact_version_and_hashes_for_everything() -> None:
    """Each line of the lock is one name, one version and SHA-256 hashes: no address, no option, nothing of CUDA."""
    for name, (requirement, hashes) in locked().items():
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), name
        assert requirement.url is None
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", given) for given in hashes), name
        assert not re.match(r"torch$|triton|nvidia|cuda", name)


def test_the_lock_agrees_with_its_inputs() -> None:
    """The lock holds every pin of constraints.txt and a fit for every dependency of pyproject.toml, but torch."""
    lock = locked()
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    stated = [line for line in pins if not line.startswith("#")]
    for given in [*stated, *PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        wanted = Requirement(given)
        if wanted.name != "torch":
            (exact,) = lock[canonicalize_name(wanted.name)][0].specifier
            assert exact.version in wanted.specifier, given
