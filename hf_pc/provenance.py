"""The command and the arguments that made a run, fit to be published: no secrets, no folders of its machine."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: flags whose value is nobody else's business
_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
#: those that only sound so
_HARMLESS = re.compile(r"tokenizer|input_tokens|average_tokens")
#: what is one whatever its flag, as an abbreviated --hub_tok
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
#: an absolute path inside an argument, such as a value of --overrides p=/home/me/x or of JSON
_FOLDER = re.compile(r"(?:(?<=[=,\"'\[{\s])|(?<=file://))/+(?:[^/\s\"',:=]+/)*(?=[^/\s\"',:=])")


class Secret(str):
    """A token that a pickle holds None of: a Trainer pickles its arguments into what it pushes."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self


def _public(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("-"):
        return f"{flag}={_public(value)}"
    return _TOKEN.sub("...", Path(argument).name if Path(argument).is_absolute() else _FOLDER.sub("", argument))


def _script(path: Path) -> list[str]:
    if path.parts[-2:] == ("hf_pc", "cli.py"):  # python -m hf_pc.cli
        return ["hf-pc"]
    if path.suffix != ".py":
        return [path.name]
    try:
        return ["python", path.resolve().relative_to(Path.cwd()).as_posix()]
    except ValueError:
        return ["python", path.name]


def command(argv: Sequence[str] | None = None) -> str | None:
    """One line of shell: the process's own command, or `argv`. None where it is neither a script nor `hf-pc`.

    The value of a flag such as --hub_token is left out, and of absolute paths only their last part is shown.
    """
    given = list(sys.argv if argv is None else argv)
    name = Path(given[0]).name if given else ""
    if name == "__main__.py" or not (name.endswith(".py") or name == "hf-pc"):
        return None
    shown, hidden = _script(Path(given[0])), False
    for argument in given[1:]:
        flag = argument.partition("=")[0] if argument.startswith("-") else ""
        if hidden and not flag:
            shown.append("...")
            hidden = False
            continue
        hidden = bool(_SECRET.search(flag)) and not _HARMLESS.search(flag)
        if hidden and "=" in argument:
            shown.append(f"{flag}=...")
            hidden = False
        else:
            shown.append(_public(argument))
    return shlex.join(shown).replace("'...'", "...")
