"""Steering: what a PC model learns about its own relaxation, once per optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_pc.checks import check_scale
from hf_pc.config import PCConfig
from hf_pc.learning import phases_of
from hf_pc.measurements import BACKPROP_LIKE, add_sums, relaxed_fraction, signal_bias
from hf_pc.processes import process_count, process_index

INITIAL_RELATIVE_STD = 0.2
GAIN, LIMIT = 0.5, 0.7
SMALLEST_STD, LARGEST_STD = 1e-6, 1e6
SMALLEST_ACTIVITY = 1e-8


class Steering:
    """Holds `relaxed_fraction` at its target by moving one factor, `relative_std`, on the strength of all nodes.

    Attributes:
        relative_std: sigma as a multiple of each node's activity.
        activity: the RMS of each site's predictions in the last optimiser step.
        rows: sequences learned so far on all processes, modulo 2; where signs alternate they go on from there.
    """

    def __init__(self, config: PCConfig) -> None:
        self.rows = 0
        self.target = config.relaxed_fraction if config.sweeps > 1 else None
        self.bias_limit = config.bias_limit
        #: of the bias, in relative_std squared
        self.bias_order = len(phases_of(config.learning, config.strengths))
        self.relative_std = config.relative_std or INITIAL_RELATIVE_STD
        self.activity: dict[str, float] = {}
        self._seen: dict[str, Tensor] = {}

    def observe(self, sums: Mapping[str, Tensor]) -> None:
        """Note the measurements of a learned batch."""
        kept = ("change", "reference", "bias", "prediction_square/", "size/")
        add_sums(self._seen, {name: value for name, value in sums.items() if name.startswith(kept)})

    def signs(self, batch: int, device: torch.device) -> Tensor:
        """+1, -1, ... over the sequences of all processes, in order of rank: those of this process, [batch]."""
        before = self.rows + process_index() * batch
        return 1.0 - 2.0 * torch.arange(before, before + batch, device=device).remainder(2)

    def count_rows(self, batch: int) -> None:
        """Note that a batch of as many sequences on each process was learned."""
        self.rows = (self.rows + batch * process_count()) % 2

    def pause(self) -> tuple[dict[str, Tensor], int]:
        """What was noted since the last step, to give back to `resume`: what comes in between does not count."""
        seen, self._seen = self._seen, {}
        return seen, self.rows

    def resume(self, before: tuple[dict[str, Tensor], int]) -> None:
        """The inverse of `pause`."""
        self._seen, self.rows = before

    def step(self, reduce: Callable[[Tensor], Tensor], *, steers: bool) -> None:
        """Take up the activities, and move relative_std by what was noted since the last step.

        The fraction grows as relative_std squared while it is small, so half the logarithm of what is missing is
        the step that would close the gap; it is damped and bounded. It stays without a target or at T = 1.

        With a limit on the bias, which n phases have grow as relative_std to the power of 2n, that one is approached
        instead where it asks for less relaxation; but never for less than a relaxed_fraction of 0.02, since a part
        of the bias in half precision is rounding, which no precision of the errors lowers.

        Args:
            reduce: sums a tensor over processes.
            steers: whether any node's strength follows relative_std.
        """
        names, noted = list(self._seen), list(self._seen.values())
        self._seen = {}
        if not noted:
            return
        seen = dict(zip(names, reduce(torch.stack(noted)).unbind(), strict=True))
        squares = {name.removeprefix("size/"): size for name, size in seen.items() if name.startswith("size/")}
        for label, size in squares.items():
            rms = math.sqrt(seen[f"prediction_square/{label}"] / size)
            if math.isfinite(rms) and rms > SMALLEST_ACTIVITY:
                self.activity[label] = rms
        if self.target is None or not steers:
            return
        measured = relaxed_fraction(seen)
        if not math.isfinite(measured) or not seen["reference"]:  # no signal, or no node to meet it
            return
        missing = _missing(self.target, measured)
        if self.bias_limit is not None:
            bias = signal_bias(seen)
            if not math.isfinite(bias):  # a later phase alone may overflow in mixed precision
                return
            least = _missing(min(self.target, BACKPROP_LIKE), measured)
            missing = min(missing, max(least, _missing(self.bias_limit, bias) / self.bias_order))
        step = 0.5 * GAIN * missing
        moved = self.relative_std * math.exp(max(-LIMIT, min(LIMIT, step)))
        self.relative_std = max(SMALLEST_STD, min(LARGEST_STD, moved))

    def state_dict(self) -> dict[str, Any]:
        """What was learned, ready for JSON."""
        state: dict[str, Any] = {"relative_std": self.relative_std}
        if self.activity:
            state["activity"] = dict(self.activity)
        return state | ({"rows": self.rows} if self.rows else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError on anything else."""
        check_state(state)
        if self.target is not None:  # one that is given stays as it is given
            self.relative_std = float(state["relative_std"])
        self.rows = int(state.get("rows", 0))
        self.activity = {name: float(value) for name, value in state.get("activity", {}).items()}


def _missing(wanted: float, measured: float) -> float:
    """The logarithm of what is wanted over what was measured."""
    return math.log(wanted / max(measured, 1e-6 * wanted))


def check_state(state: Any) -> None:
    """Raise ValueError if this is no `PCModel.state_dict`."""
    value = state.get("relative_std") if isinstance(state, Mapping) else None
    check_scale("state", "relative_std", value, upper=LARGEST_STD)
    if isinstance(state.get("rows", 0), bool) or state.get("rows", 0) not in (0, 1):
        raise ValueError(f"state.rows={state['rows']!r} is not allowed: 0 or 1 is needed")
    energies = state.get("energies", {})
    if not isinstance(energies, Mapping) or not all(isinstance(own, Mapping) for own in energies.values()):
        raise ValueError(f"state.energies={energies!r} is not allowed: an object of objects is needed")
    activity = state.get("activity", {})
    if not isinstance(activity, Mapping):
        raise ValueError(f"state.activity={activity!r} is not allowed: an object of numbers is needed")
    for name, rms in activity.items():
        check_scale("state", f"activity[{name!r}]", rms)
