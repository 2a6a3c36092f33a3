"""What the relaxations of a training run measured: sums that add up over batches, phases and processes, and what is
said of them: means, and the name of the regime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pc.dtypes import exact

OUTPUT_LABEL = "output"
#: under this relaxed_fraction a step is backprop's in all but name
BACKPROP_LIKE = 0.02
#: under this residual a batch is at its equilibrium
AT_EQUILIBRIUM = 0.05
#: what every phase adds to; the rest is reported of the first phase alone
EVERY_PHASE = ("sweeps", "tried", "refused", "residual", "sequences", "bias", "nonfinite")


def on_cpu(scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars as float64 on the CPU; a device is read once, however many of them it has."""
    found: dict[str, Tensor] = {}
    by_device: dict[torch.device, list[str]] = {}
    for name, value in scalars.items():
        by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():
        values = torch.stack([exact(scalars[name]) for name in names]).detach().cpu().double()
        # each by itself: a view is sent to other processes with all that it is a view of
        found |= {name: value.clone() for name, value in zip(names, values, strict=True)}
    return {name: found[name] for name in scalars}


def residual(gradient: Tensor, signal: Tensor) -> Tensor:
    """|dF/dx| / |g| from their squares; 0 where no signal arrives."""
    return torch.where(signal == 0, 0.0, gradient.sqrt() / signal.sqrt())  # the ratio of the squares may overflow


def first_nonfinite(sums: Mapping[str, Tensor]) -> str | None:
    """The first node, in the order of the forward pass, whose prediction or energy is not finite, or the output.

    Args:
        sums: of one relaxation.
    """
    for kind in ("prediction_square/", "energy/"):  # errors spread what is wrong with a prediction to all nodes
        for name, value in sums.items():
            label = name.removeprefix(kind)
            if name.startswith(kind) and label != OUTPUT_LABEL and not bool(value.isfinite()):
                return label
    return None if bool(sums[f"energy/{OUTPUT_LABEL}"].isfinite()) else OUTPUT_LABEL


def add_sums(total: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Add `new` to `total` in place."""
    for name, value in new.items():
        total[name] = total[name] + value if name in total else value


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _root_ratio(sums: Mapping[str, Tensor | float], above: str, below: str) -> float:
    return _ratio(math.sqrt(sums[above]), math.sqrt(sums[below]))


def relaxed_fraction(sums: Mapping[str, Tensor | float]) -> float:
    """|g_out(relaxed) - g_out(feedforward)| / |g_out(feedforward)|, g_out the signal that reaches the last node."""
    return _root_ratio(sums, "change", "reference")


def signal_bias(sums: Mapping[str, Tensor | float]) -> float:
    """|what the last node's module learned from - g_out(feedforward)| / |g_out(feedforward)|, over all phases of a
    rule of learning; nan where nothing was learned."""
    return _root_ratio(sums, "bias", "reference") if "bias" in sums else math.nan


def summary(measured: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means of summed measurements: energies in nats per label token, the rest without units."""
    sums = {name: float(value) for name, value in measured.items()}
    labels = [name.removeprefix("error_square/") for name in sums if name.startswith("error_square/")]
    displacement = {
        label: _root_ratio(sums, f"error_square/{label}", f"prediction_square/{label}") for label in labels
    }
    return {
        "free_energy": _ratio(sums["free_energy"], sums["tokens"]),
        "energies": {
            name.removeprefix("energy/"): _ratio(value, sums["tokens"])
            for name, value in sums.items()
            if name.startswith("energy/")
        },
        "residual": _ratio(sums["residual"], sums["sequences"]),
        "relaxed_fraction": relaxed_fraction(sums),
        "signal_bias": signal_bias(sums),
        "displacement": displacement,
        "sweeps": _ratio(sums["sweeps"], sums["batches"]),
        "refused": _ratio(sums["refused"], sums["tried"]),
    }


def regime(relaxed_fraction: float, residual: float) -> str:
    """The name of a regime: "backprop-like" (relaxed_fraction under 0.02), "equilibrium" (residual under 0.05) or
    "relaxing"."""
    if relaxed_fraction < BACKPROP_LIKE:
        return "backprop-like"
    return "equilibrium" if residual < AT_EQUILIBRIUM else "relaxing"
