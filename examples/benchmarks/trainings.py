"""What a benchmark that was broken off need not do again: each training's findings and its model, in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GPT2LMHeadModel

Found = tuple[GPT2LMHeadModel, dict[str, Any]]


def kept(folder: Path, setting: dict[str, Any], run: Callable[[], Found]) -> Found:
    """What `run` found with this setting before, if the folder has it; if not, what it finds now, which is kept there.

    Args:
        folder: of this training; one that was broken off, or had another setting, is replaced.
        setting: all that the findings depend on.
        run: trains; the model, and what is to be reported, ready for JSON.
    """
    notes = folder / "training.json"
    given = json.loads(json.dumps(setting, default=str))
    if notes.is_file() and (folder / "model.safetensors").is_file():
        before = json.loads(notes.read_text(encoding="utf-8"))
        if before["setting"] == given:
            return GPT2LMHeadModel.from_pretrained(folder), before["facts"]
    notes.unlink(missing_ok=True)
    model, facts = run()
    model.save_pretrained(folder)
    unfinished = folder / "training.json.unfinished"
    unfinished.write_text(json.dumps({"setting": given, "facts": facts}), encoding="utf-8")
    unfinished.replace(notes)
    return model, facts
