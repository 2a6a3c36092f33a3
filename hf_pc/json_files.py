"""Reading JSON of folders and Hub repositories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file


def read_json(path_or_repo: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> Any:
    """What a JSON file of a folder or a Hub repository holds; None where there is no such file.

    Raises:
        ValueError: it is no JSON file.
    """
    found = cached_file(str(path_or_repo), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if found is None:
        return None
    return read_json_file(Path(found))


def read_json_file(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError if it is none, or holds nothing."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if values is None:
        raise ValueError(f"{path} holds null: an object is needed")
    return values
