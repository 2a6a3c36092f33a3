"""What a finished or running training has left in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from hf_pc.json_files import read_json_file


def read(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError if the file holds none, FileNotFoundError if there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    found = read_json_file(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """The log history of a run, from its folder or its last checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is empty or malformed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    path, last = folder / "trainer_state.json", get_last_checkpoint(str(folder))
    if last is not None:
        saved = Path(last) / "trainer_state.json"
        # a run that was resumed has written there since, and one that has not ended there alone
        if not path.is_file() or (saved.is_file() and saved.stat().st_mtime > path.stat().st_mtime):
            path = saved
    entries = read(path).get("log_history")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("step"), int | float) for entry in entries
    ):
        raise ValueError(f"{path} holds no log history")
    if not entries:
        raise ValueError(f"{path}: nothing was logged yet")
    return entries
