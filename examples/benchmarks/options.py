"""Numbers on the command line of a benchmark; of the standard library alone, for interpreters without PyTorch."""

from __future__ import annotations

import argparse


def natural(text: str, least: int = 0) -> int:
    """A whole number from `least` on."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is not allowed: at least {least} is needed")
    return value


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return natural(text, 1)
