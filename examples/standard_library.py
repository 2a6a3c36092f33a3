"""Text that every Python has: the documented functions of its standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Function(NamedTuple):
    """One function: where it lives, how it is called, and the first line of what it says of itself."""

    package: str
    module: str
    signature: str
    line: str


def functions() -> Iterator[Function]:
    """Every documented function, tests and installed packages left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
                line = doc.strip().splitlines()[0] if doc.strip() else ""
                if line:
                    signature = f"{node.name}({ast.unparse(node.args)})"
                    yield Function(path.relative_to(library).parts[0].removesuffix(".py"), path.stem, signature, line)
