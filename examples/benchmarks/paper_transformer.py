"""The transformer experiment of arXiv 2211.03481: one block, width 128, sequences of 32, 8001 BPE tokens.

    python examples/benchmarks/paper_transformer.py --train_file text.txt --seeds 3

Prints one JSON line per method and seed, and one with mean and spread per method; leaves a table and a figure. Nodes
are the paper's (preset "linear" and the attention logits). Each method takes the learning rate, of the same few, that
does best on validation text with seed 0. Perplexity is that of a plain forward pass over held-out text. Published:
backprop 162.6, KL energies 175.9, Gaussian energies 590.1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from language import Text, arguments, compare, split
from options import positive
from tokenizers import ByteLevelBPETokenizer

from hf_pc import PCConfig

#: small enough for minutes on two cores; docs/experiments.md has the longer run
DEFAULTS = {"steps": 100, "batch": 16, "layers": 1, "hidden": 128, "heads": 8, "sequence": 32, "sweeps": 4, "seeds": 3,
            "learning_rates": [2e-3, 4e-3], "methods": ["backprop", "pc_kl", "pc_gaussian"],
            "output_dir": Path("runs/paper_transformer")}  # fmt: skip


def methods(args: argparse.Namespace) -> dict[str, PCConfig | None]:
    """Backprop; KL and Gaussian attention logits, steered to one regime and at fixed precisions (the paper's is 1)."""
    common: dict[str, Any] = {"nodes": "linear", "sweeps": args.sweeps}
    steered = common | {"relaxed_fraction": args.relaxed_fraction}
    energies = {"pc_kl": "categorical", "pc_gaussian": "gaussian"}
    found = {"backprop": None} | {n: PCConfig(attention_energy=energy, **steered) for n, energy in energies.items()}
    for precision in args.precisions:
        for name, energy in energies.items():
            config = PCConfig(attention_energy=energy, precision=precision, **common)
            found[f"{name}_precision_{precision:g}"] = config
    return found


def load(args: argparse.Namespace) -> Text:
    """The tokenizer saw the training text alone."""
    parts = split(args)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([parts[0]], vocab_size=args.vocabulary, show_progress=False)
    return Text(*(torch.tensor(bpe.encode(part).ids) for part in parts), vocabulary=args.vocabulary)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--vocabulary", type=positive, default=8001)
    parser.add_argument("--relaxed_fraction", type=float, default=0.05)
    parser.add_argument(
        "--precisions", type=float, nargs="+", default=[1.0], help="for methods such as pc_kl_precision_1"
    )
    args = parser.parse_args(argv)
    return compare(methods(args), load(args), args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
