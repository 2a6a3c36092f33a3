"""`hf-pc`: one command per module of `hf_pc.commands`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_pc.commands import card, compare, doctor, nodes, plot
from hf_pc.trainer import NonFiniteEnergyError

COMMANDS: dict[str, Any] = {"nodes": nodes, "doctor": doctor, "compare": compare, "plot": plot, "card": card}
#: exit status where a check failed or training diverged; where an argument is wrong, or what it names is not there;
#: and where the user stopped it, as shells have it
FAILED, WRONG, STOPPED = 1, 2, 130


class _Parser(argparse.ArgumentParser):
    """Says as JSON too what is wrong with its arguments, where JSON was asked for."""

    asked: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        if "--json" in _Parser.asked:
            print(json.dumps({"error": message}))
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-pc", description="Predictive coding for Hugging Face models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=f"example: {command.EXAMPLE}"
        )
        command.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _finite(found: Any) -> Any:
    """The same with null for numbers that JSON does not know: not-a-number, infinities."""
    if isinstance(found, dict):
        return {name: _finite(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _complain(args: argparse.Namespace, message: str, status: int) -> int:
    print(f"hf-pc: {message}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": message}))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or one of FAILED, WRONG and STOPPED with one line on standard error, and with --json an object
    that holds this line as "error" on standard output."""
    _Parser.asked = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        found = command.run(args)
    except KeyboardInterrupt:
        return _complain(args, "stopped", STOPPED)
    except NonFiniteEnergyError as error:
        return _complain(args, str(error), FAILED)
    except (
        ValueError, TypeError, AttributeError, ImportError, OSError, RuntimeError, LookupError, SafetensorError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        lines = str(error).splitlines() or [type(error).__name__]
        return _complain(args, lines[0], WRONG)
    if args.json:
        print(json.dumps(_finite(found)))
    else:
        command.show(found, args)
    return FAILED if getattr(command, "failed", lambda found: False)(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
