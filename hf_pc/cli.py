"""`hf-pc`: one command per module of `hf_pc.commands`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from hf_pc.commands import card, doctor, nodes, plot

COMMANDS: dict[str, Any] = {"nodes": nodes, "doctor": doctor, "plot": plot, "card": card}
#: exit status where an argument is wrong, or what it names is not there
WRONG = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-pc", description="Predictive coding for Hugging Face models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=f"example: {command.EXAMPLE}"
        )
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a check failed; 2 where an argument is wrong or what it names is not there."""
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        found = command.run(args)
    except (ValueError, TypeError, AttributeError, OSError, RuntimeError, LookupError, SafetensorError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        print(f"hf-pc: {lines[0]}", file=sys.stderr)
        return WRONG
    if args.json:
        print(json.dumps(found))
    else:
        command.show(found, args)
    return int(getattr(command, "failed", lambda found: False)(found))


if __name__ == "__main__":
    raise SystemExit(main())
