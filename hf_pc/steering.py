"""Steering: what a PC model learns about its own relaxation, once per optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pc.config import PCConfig, check_scale
from hf_pc.relaxation import add_sums, relaxed_fraction

INITIAL_RELATIVE_STD = 0.2
GAIN, LIMIT = 0.5, 0.7
SMALLEST_STD, LARGEST_STD = 1e-6, 1e6


class Steering:
    """Holds `relaxed_fraction` at its target by moving one factor, `relative_std`, on the strength of all nodes."""

    def __init__(self, config: PCConfig) -> None:
        self.target = config.relaxed_fraction if config.sweeps > 1 else None
        self.relative_std = config.relative_std or INITIAL_RELATIVE_STD
        self._seen: dict[str, Tensor] = {}

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Note the measurements of a learned batch."""
        add_sums(self._seen, {name: sums[name] for name in ("change", "reference")})

    def pause(self) -> dict[str, Tensor]:
        """What was noted since the last step, to give back to `resume`: what comes in between does not count."""
        seen, self._seen = self._seen, {}
        return seen

    def resume(self, seen: dict[str, Tensor]) -> None:
        """The inverse of `pause`."""
        self._seen = seen

    def step(self, reduce: Callable[[Tensor], Tensor], *, steers: bool) -> None:
        """Move relative_std by what was noted since the last step.

        The fraction grows as relative_std squared while it is small, so half the logarithm of what is missing is
        the step that would close the gap; it is damped and bounded. Does nothing without a target or at T = 1.

        Args:
            reduce: sums a tensor over processes.
            steers: whether any node's strength follows relative_std.
        """
        seen, self._seen = self._seen, {}
        if self.target is None or not steers or not seen:
            return
        change, reference = reduce(torch.stack([seen["change"], seen["reference"]])).unbind()
        measured = relaxed_fraction({"change": change, "reference": reference})
        if not math.isfinite(measured):
            return
        step = 0.5 * GAIN * math.log(self.target / max(measured, 1e-6 * self.target))
        moved = self.relative_std * math.exp(max(-LIMIT, min(LIMIT, step)))
        self.relative_std = max(SMALLEST_STD, min(LARGEST_STD, moved))


def check_state(state: Any) -> None:
    """Raise ValueError if this is no `PCModel.state_dict`."""
    value = state.get("relative_std") if isinstance(state, Mapping) else None
    check_scale("state", "relative_std", value, upper=LARGEST_STD)
