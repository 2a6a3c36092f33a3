"""A step as one CUDA graph: what a GPU is told in a step is recorded once for each form of batch, then told at once.

Told by Python kernel by kernel, a step of many passes over small blocks leaves the GPU waiting most of the time. A
recording is right for other batches and other weights as long as nothing that Python decides in a step depends on
numbers. What does is taken out of it:

- precisions and signs are read from buffers, which are filled before each step;
- labels are looked at before the step, and an attention mask that hides nothing is left out;
- whether the last pass of a phase stands is told by the recording, which takes it for granted. Where it did not, a
  second recording is played instead, in which every phase runs its last pass again, from errors that stand; and so in
  the steps that follow, until all last passes stand;
- whatever a recorded step measures, and every weight's gradient, is copied out behind it.

A step is recorded after some of its form that Python told (`hf_pc.recorder`): those compile and tune what is recorded.
The alternative, graphs of single blocks as `torch.compile` makes them ("reduce-overhead"), leaves what lies between
blocks to Python, which is as much again, and keeps what a later pass would overwrite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import masking_utils

from hf_pc.node import Site

if TYPE_CHECKING:
    from hf_pc.model import PCModel

#: of each phase what was measured, and tensors to report
Learned = tuple[list[dict[str, Tensor]], dict[str, Any]]
#: a step, given its inputs and what the gradient is a mean over
Step = Callable[[Mapping[str, Any], Tensor | int | None], Learned]


#: makes something to `play` of what runs on a device
Record = Callable[[Callable[[], None], torch.device], Any]


@dataclass
class Buffers:
    """What a recorded step reads anew each time it is played, and what it leaves to be decided behind it.

    Args:
        precisions: of each site without one of its own, by its label; float64 scalars.
        signs: of the sequences, [batch]; None where the rule of learning has none.
        careful: every phase runs its last pass again, from errors that stand.
    """

    precisions: dict[str, Tensor]
    signs: Tensor | None
    careful: bool
    #: of each phase, whether its last pass stood for all sequences
    stood: list[Tensor] = field(default_factory=list)

    def decide(self, stands: Tensor) -> bool:
        """What the solver takes for the answer whether a last pass stands for all sequences."""
        self.stood.append(stands)
        return not self.careful


class CudaGraph:
    """What `run` tells a device, to be told again."""

    #: those that there are, by their device, whose memory all use in turn
    _others: ClassVar[dict[torch.device, WeakSet[CudaGraph]]] = defaultdict(WeakSet)
    _graph: torch.cuda.CUDAGraph

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        others = CudaGraph._others[device]
        pool = next((other._graph.pool() for other in others), None)
        self._device = device
        with torch.cuda.device(device):
            self._graph = torch.cuda.CUDAGraph()
            # other threads may pin memory meanwhile, as those of data loaders do
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                run()
        others.add(self)

    def play(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Recording:
    """One step over batches of a form.

    Args:
        pc: whose step it is.
        step: relaxes a batch and adds every weight's gradient to its `.grad`, given the inputs and what the gradient
            is a mean over.
        inputs: a batch of the form.
        items: the same of a mean.
        sites: those that fire in the step.
        careful: see `Buffers`.
        record: makes what is played of what is run, a `CudaGraph`.
    """

    def __init__(
        self, pc: PCModel, step: Step, inputs: Mapping[str, Any], items: Tensor | None, sites: Sequence[Site], *,
        careful: bool, record: Record,
    ) -> None:  # fmt: skip
        self._pc = pc
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._items = None if items is None else items.clone()
        weights = list(pc.model.parameters())
        device = weights[0].device
        labels = [site.label for site in sites]
        self._nodes = [site.node for site in sites]
        self._precisions = torch.empty(len(sites), dtype=torch.float64, device=device)
        mirrored = any(phase.mirrored for phase in pc.phases)
        signs = torch.empty(len(inputs["labels"]), device=device) if mirrored else None
        self.buffers = Buffers(dict(zip(labels, self._precisions.unbind(), strict=True)), signs, careful)
        self._learned: Learned
        self._fill(inputs, items)

        def run() -> None:
            self._learned = step(self._inputs, self._items)

        before = [weight.grad for weight in weights]
        try:
            for weight in weights:
                weight.grad = None
            with pc.recorded(self.buffers), unpacked(self._inputs):
                self._played = record(run, device)
            self._gradients = [(weight, weight.grad) for weight in weights if weight.grad is not None]
        finally:
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient

    def _fill(self, inputs: Mapping[str, Any], items: Tensor | None) -> None:
        """Put what the step reads where it reads it."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        if self._items is not None and items is not None:
            self._items.copy_(items)
        strength = self._pc.strength()
        labels = self.buffers.precisions
        numbers = [strength.number(node, label) for node, label in zip(self._nodes, labels, strict=True)]
        self._precisions.copy_(torch.tensor(numbers, dtype=torch.float64), non_blocking=True)
        if self.buffers.signs is not None:
            self.buffers.signs.copy_(self._pc.steering.signs(len(self.buffers.signs), self.buffers.signs.device))

    def play(self, inputs: Mapping[str, Any], items: Tensor | None) -> bool:
        """Take the step with another batch of the form; whether the last pass of every phase stood."""
        self._fill(inputs, items)
        self._played.play()
        return not self.buffers.stood or bool(torch.stack(self.buffers.stood).all())

    def learned(self) -> Learned:
        """What the last step played has measured; it is there until the next one. Adds its gradients to `.grad`."""
        for weight, gradient in self._gradients:
            weight.grad = gradient.clone() if weight.grad is None else weight.grad.add_(gradient)
        measured, report = self._learned
        return measured, {name: v.clone() if isinstance(v, Tensor) else v for name, v in report.items()}


@contextmanager
def unpacked(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers does not ask whether positions are those of several sequences in a row, where it is the
    model that counts them: while a step is recorded it takes them for such, and masks what it could leave to a kernel.
    """
    counts = inputs.get("position_ids") is None and inputs.get("attention_mask") is None
    if not counts:
        yield
        return
    with patch.multiple(
        masking_utils, find_packed_sequence_indices=lambda *_, **__: None, is_tracing=lambda *_: False
    ):
        yield
