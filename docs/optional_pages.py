"""A hook of MkDocs: guides of parts that not every copy of the repository has join the navigation where they exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: page, and the section it belongs to
OPTIONAL = {"distributed.md": "Guides"}


def on_config(config: Any) -> Any:
    for page, section in OPTIONAL.items():
        if (Path(config["docs_dir"]) / page).is_file():
            pages = next(entry[section] for entry in config["nav"] if section in entry)
            if page not in pages:
                pages.append(page)
    return config
