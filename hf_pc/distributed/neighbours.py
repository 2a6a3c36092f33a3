"""What processes that hold neighbouring blocks tell each other: states upwards, signals downwards, sums to all.

Sends and receives are started early and waited for late, so that they pass while blocks compute. Their order is the
same in every sweep, so that messages between two processes need no names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hf_pc.measurements import OUTPUT_LABEL
from hf_pc.processes import gathered, process_count, process_index
from hf_pc.relaxation import Share

#: of `Relaxation.sums` what each process measured of its own nodes; the rest is the same on all of them
ADDED = ("change", "reference", "bias", f"energy/{OUTPUT_LABEL}")


@dataclass
class Timeline:
    """What this process did and when: (what, begin, end) in seconds of a clock that the processes of a machine share.

    Waiting for another process is "wait"; the rest is work.
    """

    events: list[tuple[str, float, float]] = field(default_factory=list)
    on: bool = False

    @contextmanager
    def noted(self, what: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        began = time.perf_counter()
        try:
            yield
        finally:
            self.events.append((what, began, time.perf_counter()))


class Neighbours(Share):
    """The line of processes, one part of the model each, in order of rank.

    Args:
        device: where the tensors of this process live.

    Attributes:
        sent: bytes of states and signals sent so far.
    """

    apart = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index, self.count = process_index(), process_count()
        self.top = self.index == self.count - 1
        self.timeline = Timeline()
        self.sent = 0
        self._sending: dict[int, tuple[dist.Work | None, Tensor]] = {}

    def send(self, to: int, tensor: Tensor) -> None:
        """Start to send; the tensor may be changed at once."""
        self.flush(to)
        copy = tensor.detach().clone().contiguous()
        self._sending[to] = dist.isend(copy, to), copy
        self.sent += copy.numel() * copy.element_size()

    def receive(self, source: int, like: Tensor) -> Receipt:
        """Start to receive a tensor of this shape and dtype."""
        buffer = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        return Receipt(dist.irecv(buffer, source), buffer, self.timeline)

    def flush(self, to: int) -> None:
        """Wait until what was sent before has gone."""
        work = self._sending.pop(to, (None, None))[0]
        if work is not None:
            with self.timeline.noted("wait"):
                work.wait()

    def sum(self, values: Tensor) -> Tensor:
        if self.count > 1:
            values = values.clone()
            with self.timeline.noted("wait"):
                dist.all_reduce(values)
        return values

    def merge(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.count == 1:
            return sums
        with self.timeline.noted("wait"):
            given: list[tuple[list[str], Tensor]] = gathered((list(sums), torch.stack(list(sums.values()))))
        parts = [dict(zip(names, values.unbind(), strict=True)) for names, values in given]
        merged = {name: value for part in parts for name, value in part.items()}
        added = [name for name in ADDED if name in sums]
        return merged | {name: torch.stack([part[name] for part in parts]).sum() for name in added}


@dataclass
class Receipt:
    """A tensor on its way."""

    work: dist.Work | None
    buffer: Tensor
    timeline: Timeline

    def wait(self) -> Tensor:
        if self.work is not None:
            with self.timeline.noted("wait"):
                self.work.wait()
            self.work = None
        return self.buffer
