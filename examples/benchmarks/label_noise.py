"""Label noise: a share of the targets is replaced by random characters, backprop against predictive coding.

    python examples/benchmarks/label_noise.py --train_file text.txt --noise 0.2

Prints what online.py prints. Validation and test text are clean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from characters import characters
from language import Batch, Text, arguments, compare, drawn
from regimes import SIZE, methods

DEFAULTS = SIZE | {"steps": 600, "batch": 8, "output_dir": Path("runs/label_noise")}


def noisy(text: Text, args: argparse.Namespace, seed: int) -> Iterator[Batch]:
    """Windows whose targets are with probability `args.noise` any character; the inputs are clean."""
    generator = torch.Generator().manual_seed(seed + 1)
    for batch in drawn(text, args, seed):
        ids = batch["input_ids"]
        wrong = torch.rand(ids.shape, generator=generator) < args.noise
        random = torch.randint(0, text.vocabulary, ids.shape, generator=generator)
        yield {"input_ids": ids, "labels": torch.where(wrong, random, ids)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--noise", type=float, default=0.2, help="share of the targets that is replaced")
    args = parser.parse_args(argv)
    if not 0 <= args.noise < 1:
        raise ValueError(f"--noise {args.noise} is not allowed: 0 to 1 is needed")
    return compare(methods(args.sweeps), characters(args), args, batches=noisy)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
