"""Text that others wrote, made safe to stand in Markdown: it is shown as it is, and can be nothing but text."""

from __future__ import annotations

import re

#: what makes markup within a line, and what else a renderer makes of it: links of addresses, HTML, cells of a table
_MARKUP = re.compile(r"[\\`*_\[\]#~$!]")
_ENTITIES = re.compile(r"[<>&|@]|(?<=:)//|(?<=www)\.", re.IGNORECASE)


def one_line(text: str, otherwise: str = "") -> str:
    """The text on one line, without control characters; `otherwise` where nothing is left."""
    printable = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "ignore").decode("utf-8"))
    return " ".join(printable.split()) or otherwise


def escape(text: str) -> str:
    """`text` on one line of Markdown, to stand after other text: no markup, link, HTML, or cell of a table."""
    escaped = _MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text))
    return _ENTITIES.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), escaped)


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
