"""The random state of one training step, so that each sweep draws the same dropout mask."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def draws_from_numpy(model: nn.Module) -> bool:
    """Whether the code of any of its modules knows numpy, as SpecAugment's does: its generator takes long to copy.

    A forward that has others draw for it, in a file of its own without numpy, is not seen.
    """
    sources = {type(module).__module__ for module in model.modules()} & sys.modules.keys()
    return any(value is np or value is np.random for name in sources for value in vars(sys.modules[name]).values())


class RandomState:
    """A copy of the generators' state: Python's, torch's on the CPU and on the devices of a model, and numpy's.

    Args:
        devices: the model's.
        numpy: whether that is among them.
    """

    def __init__(self, devices: Iterable[torch.device], numpy: bool) -> None:
        self._devices = set(devices)
        self._python = random.getstate()
        self._numpy = np.random.get_state() if numpy else None
        self._cpu = torch.get_rng_state()
        own = [device for device in self._devices if device.type not in ("cpu", "meta")]
        self._accelerators = {d: torch.get_device_module(d).get_rng_state(*_named(d)) for d in own}

    def now(self) -> RandomState:
        """A copy of the same generators' present state."""
        return RandomState(self._devices, self._numpy is not None)

    def holds(self) -> bool:
        """Whether nothing was drawn since."""
        now = self.now()
        same = all(torch.equal(state, now._accelerators[device]) for device, state in self._accelerators.items())
        same = same and self._python == now._python and torch.equal(self._cpu, now._cpu)
        return same and all(map(np.array_equal, self._numpy or (), now._numpy or ()))

    def restore(self) -> None:
        random.setstate(self._python)
        if self._numpy is not None:
            np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._accelerators.items():
            torch.get_device_module(device).set_rng_state(state, *_named(device))


class NothingDrawn(RandomState):
    """That of a step in which nothing is drawn: there is nothing to restore."""

    def __init__(self) -> None:
        pass

    def now(self) -> RandomState:
        return self

    def restore(self) -> None:
        pass


def _named(device: torch.device) -> tuple[torch.device, ...]:
    """The device, where its kind has several."""
    return () if device.type == "mps" else (device,)


@contextmanager
def undrawn(devices: Iterable[torch.device]) -> Iterator[None]:
    """What is drawn inside counts for nothing behind it."""
    before = RandomState(devices, numpy=True)
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
        random.seed(seed + index)
        np.random.seed((seed + index) % 2**32)
        yield
