"""Which of how many processes this is."""

from __future__ import annotations

import torch


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_index() -> int:
    """The rank; 0 without a process group."""
    return torch.distributed.get_rank() if _several() else 0


def process_count() -> int:
    """The world size; 1 without a process group."""
    return torch.distributed.get_world_size() if _several() else 1
