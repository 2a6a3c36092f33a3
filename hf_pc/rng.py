"""The random state of one training step, so that each sweep draws the same dropout mask."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class RandomState:
    """A copy of the generators' state on the CPU and on the devices of a model."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in set(devices) if d.type == "cuda"}

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
