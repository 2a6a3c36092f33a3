"""Few samples: a small part of the text, passed over many times, backprop against predictive coding.

    python examples/benchmarks/few_samples.py --train_file text.txt --characters 10000

Prints what online.py prints. Validation and test text are those of the whole text.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from characters import characters
from language import arguments, compare
from options import positive
from regimes import SIZE, methods

DEFAULTS = SIZE | {"steps": 600, "batch": 8, "output_dir": Path("runs/few_samples")}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--characters", type=positive, default=10_000, help="of the training text that are used")
    args = parser.parse_args(argv)
    if args.characters < args.sequence:
        raise ValueError(f"--characters {args.characters} is less than one --sequence of {args.sequence}")
    text = characters(args)
    return compare(methods(args.sweeps), replace(text, train=text.train[: args.characters]), args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
