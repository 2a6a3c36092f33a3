"""The random state of one training step, so that each sweep draws the same dropout mask."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """A copy of the generators' state on the CPU, those of Python and numpy too, and on the devices of a model."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # such as SpecAugment draws from
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in set(devices) if d.type == "cuda"}

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def undrawn(devices: Iterable[torch.device]) -> Iterator[None]:
    """What is drawn inside counts for nothing behind it."""
    before = RandomState(devices)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def own_stream(index: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Inside, each process draws what no other does; behind it those that drew alike before do so again."""
    seed = int(torch.randint(2**62, ()))
    with undrawn(devices):
        torch.manual_seed(seed + index)
        yield
