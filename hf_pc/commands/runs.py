"""What a finished or running training has left in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint


def read(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds none, FileNotFoundError if there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _steps(state: dict[str, Any]) -> float:
    steps = state.get("global_step")
    return steps if isinstance(steps, int | float) else -1


def history(folder: Path) -> list[dict[str, Any]]:
    """The log history of a run, from its folder or its last checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is empty or malformed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    places = [folder, *(Path(last) for last in (get_last_checkpoint(str(folder)),) if last is not None)]
    paths = [place / "trainer_state.json" for place in places]
    states = {path: read(path) for path in paths if path.is_file()} or {paths[0]: read(paths[0])}
    path = max(states, key=lambda path: _steps(states[path]))  # a resumed run is further in its checkpoint
    entries = states[path].get("log_history")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("step"), int | float) for entry in entries
    ):
        raise ValueError(f"{path} holds no log history")
    if not entries:
        raise ValueError(f"{path}: nothing was logged yet")
    return entries
