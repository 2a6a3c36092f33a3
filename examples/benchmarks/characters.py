"""A text as characters."""

from __future__ import annotations

import argparse

import torch
from language import Text, split


def characters(args: argparse.Namespace) -> Text:
    """The text of `args.train_file`, split; a character that the training text lacks counts as its first."""
    parts = split(args)
    index = {character: i for i, character in enumerate(sorted(set(parts[0])))}
    return Text(*(torch.tensor([index.get(c, 0) for c in part]) for part in parts), vocabulary=len(index))
