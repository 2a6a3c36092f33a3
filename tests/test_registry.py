"""A registry explains itself."""

from __future__ import annotations

import pytest

from hf_pc.registry import Registry


def test_a_registry_names_what_is_wrong() -> None:
    """A name that is taken, a name and an entry that are unknown: errors with the names that there are."""
    found: Registry[object] = Registry("solver")
    entry = found.register("error")(object())
    assert found["error"] is entry
    assert found.name_of(entry) == "error"
    with pytest.raises(ValueError, match="solver 'error' is registered already: choose another name"):
        found.register("error")(object())
    with pytest.raises(ValueError, match="solver='eror' is unknown; allowed: 'error'"):
        found["eror"]
    with pytest.raises(ValueError, match="is no registered solver"):
        found.name_of(object())
