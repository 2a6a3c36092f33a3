"""What a figure was measured on."""

from __future__ import annotations

import platform

import torch


def processor(device: torch.device) -> str:
    """The GPU by its name; of a CPU the architecture."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} {device.type}"
