"""Online learning: one sequence per step, backprop against predictive coding.

    python examples/benchmarks/online.py --train_file text.txt

Prints one JSON line per method and seed, and one per method with the gap to backprop (nats per token, 95% interval
over seeds) and the regime. Each method takes the learning rate, of the same few, that does best on validation text.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from characters import characters
from language import arguments, compare
from regimes import SIZE, methods

DEFAULTS = SIZE | {"steps": 1500, "batch": 1, "output_dir": Path("runs/online")}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(__doc__, **DEFAULTS).parse_args(argv)
    return compare(methods(args.sweeps), characters(args), args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
