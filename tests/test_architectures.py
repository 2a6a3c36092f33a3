"""Every architecture of docs/models.md, and the page itself."""

from __future__ import annotations

import pytest
from architectures import NAMES, PAGE, facts


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    """Blocks are found, all presets hold, T = 1 is backprop, F never rises, what backprop teaches learns."""
    found = facts(name)
    assert found.blocks >= 1
    assert found.presets == ("block", "sublayer", "linear")
    assert found.difference < 1e-10
    assert not found.rises
    assert found.row(name) in PAGE.read_text(encoding="utf-8")


def test_the_page_lists_what_is_tested() -> None:
    """docs/models.md has a row for each architecture and no other."""
    rows = [line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert rows == list(NAMES)
