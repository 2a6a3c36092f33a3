"""A step as one CUDA graph: what a step launches is recorded once for each form of batch, then launched at once.

Launched by Python kernel by kernel, a step of many passes over small blocks leaves the GPU waiting. A recording is
right for other batches and other weights as long as nothing that Python decides in a step depends on numbers. What
does so is taken out of it:

- precisions and signs are read from buffers, which are filled before each step;
- labels are looked at before the step, and an attention mask that hides nothing is left out;
- whether the last pass of a phase is accepted: the recording takes that for granted, and says whether it was right.
  Where it was not, a second recording is replayed instead, in which every phase runs its last pass again from errors
  that are accepted; and so in the steps that follow, until all last passes would have been;
- whatever a recorded step measures, and every weight's gradient, is copied out behind it.

A step is recorded after some of its form have run normally (`hf_pc.recorder`); they compile and tune what is recorded.
The alternative, graphs of single blocks as `torch.compile` makes them ("reduce-overhead"), leaves what lies between
blocks to Python, which is as much again, and keeps what a later pass would overwrite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import masking_utils

from hf_pc.learning import Phase
from hf_pc.node import Node, Strength
from hf_pc.output import Output
from hf_pc.steering import Steering

#: of each phase what was measured, and tensors to report
Learned = tuple[list[dict[str, Tensor]], dict[str, Any]]
#: a step, given its inputs and what the gradient is a mean over
Step = Callable[[Mapping[str, Any], Tensor | int | None], Learned]
#: node and label of a site
Place = tuple[Node, str]
#: makes something to `replay` of what runs on a device
Record = Callable[[Callable[[], None], torch.device], Any]


@dataclass
class Buffers:
    """What a recorded step reads anew in each replay, and what it leaves to be decided behind it.

    Args:
        precisions: of each site without one of its own, by its label; float64 scalars.
        signs: of the sequences, [batch]; None where the rule of learning has none.
        careful: every phase runs its last pass again, from errors that are accepted.
    """

    precisions: dict[str, Tensor]
    signs: Tensor | None
    careful: bool
    #: of each phase, whether its last pass is accepted for all sequences
    accepted: list[Tensor] = field(default_factory=list)

    def decide(self, accepted: Tensor) -> bool:
        """What the solver takes for the answer whether a last pass is accepted for all sequences."""
        self.accepted.append(accepted)
        return not self.careful


class Recordable(Protocol):
    """What a recording needs of the PCModel whose step it is."""

    model: nn.Module
    output: Output
    phases: tuple[Phase, ...]
    steering: Steering

    @property
    def nodes(self) -> list[Node]: ...

    def strength(self) -> Strength: ...

    def recorded(self, buffers: Buffers) -> AbstractContextManager[None]: ...


class CudaGraph:
    """What `run` launches on a device, to be launched again at once."""

    #: those that there are, by their device, whose memory all use in turn
    _others: ClassVar[dict[torch.device, WeakSet[CudaGraph]]] = defaultdict(WeakSet)
    #: where they are recorded; torch's own stream for this is one for all devices
    _streams: ClassVar[dict[torch.device, Any]] = {}
    _graph: torch.cuda.CUDAGraph

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        others = CudaGraph._others[device]
        pool = next((other._graph.pool() for other in others), None)
        self._device = device
        with torch.cuda.device(device):
            before = torch.cuda.current_stream()
            if device not in CudaGraph._streams:
                CudaGraph._streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream = CudaGraph._streams[device]
            self._graph = torch.cuda.CUDAGraph()
            raised: list[Exception] = []
            try:
                # other threads may pin memory meanwhile, as those of data loaders do
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        run()
                    except Exception as error:
                        raised.append(error)
                        raise
            except RuntimeError:  # of the end of the recording, it may be, which says less
                if raised:
                    raise raised[0] from None
                raise
            finally:
                torch.cuda.set_stream(before)  # which torch leaves undone where nothing could be recorded
        others.add(self)

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Gradients:
    """Where all recordings of a PCModel leave the gradients of the weights, one after another."""

    def __init__(self) -> None:
        self._held: dict[Tensor, Tensor] = {}

    def prepare(self, weights: Iterable[Tensor]) -> None:
        """Make room for what is to be recorded."""
        for weight in weights:
            if weight.requires_grad and weight not in self._held:
                self._held[weight] = torch.empty_like(weight)

    def keep(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """Take what a step has left in `.grad`, which is empty behind it; returns whose that is."""
        found = [weight for weight in weights if weight.grad is not None]
        for weight in found:
            assert weight.grad is not None
            self._held[weight].copy_(weight.grad)
            weight.grad = None
        return found

    def add(self, weights: Iterable[Tensor]) -> None:
        """Add those of the last step to `.grad`."""
        for weight in weights:
            held = self._held[weight]
            weight.grad = held.clone() if weight.grad is None else weight.grad.add_(held)


class Recording:
    """One step over batches of a form.

    Args:
        pc: whose step it is.
        step: relaxes a batch and adds every weight's gradient to its `.grad`, given the inputs and what the gradient
            is a mean over.
        inputs: a batch of the form.
        items: label tokens that the gradient is a mean over, a scalar; None counts the batch's.
        sites: node and label of those that fire in the step.
        gradients: where they are left.
        careful: see `Buffers`.
        record: makes what is replayed of what is run, a `CudaGraph`.
    """

    def __init__(
        self, pc: Recordable, step: Step, inputs: Mapping[str, Any], items: Tensor | None, sites: Sequence[Place], *,
        gradients: Gradients, careful: bool, record: Record,
    ) -> None:  # fmt: skip
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._items = None if items is None else items.clone()
        weights = list(pc.model.parameters())
        device = weights[0].device
        self._nodes = [node for node, _ in sites]
        labels = [label for _, label in sites]
        self._precisions = torch.empty(len(sites), dtype=torch.float64, device=device)
        mirrored = any(phase.mirrored for phase in pc.phases)
        signs = torch.empty(len(inputs["labels"]), device=device) if mirrored else None
        self.buffers = Buffers(dict(zip(labels, self._precisions.unbind(), strict=True)), signs, careful)
        self._learned: Learned
        self._learning: list[Tensor] = []  # the weights that have a gradient
        self._gradients = gradients

        def run() -> None:
            self._learned = step(self._inputs, self._items)
            self._learning = gradients.keep(weights)

        buffers = list(pc.model.buffers())
        versions = [buffer._version for buffer in buffers]
        gradients.prepare(weights)
        before = [weight.grad for weight in weights]
        try:
            for weight in weights:
                weight.grad = None
            with pc.recorded(self.buffers), as_recorded(self._inputs):
                torch.clear_autocast_cache()  # what it holds of weights would not be computed again
                self._graph = record(run, device)
        finally:
            torch.clear_autocast_cache()
            for weight, gradient in zip(weights, before, strict=True):
                weight.grad = gradient
        norms = (module for module in pc.model.modules() if isinstance(module, _NormBase))
        statistics = {id(buffer) for norm in norms for buffer in norm.buffers()}  # which torch changes unnoted
        #: of the model those that the step writes to
        self.written = [
            buffer for buffer, version in zip(buffers, versions, strict=True)
            if buffer._version != version or id(buffer) in statistics
        ]  # fmt: skip

    def _fill(self, pc: Recordable, inputs: Mapping[str, Any], items: Tensor | None) -> None:
        """Put what the step reads where it reads it."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        if self._items is not None and items is not None:
            self._items.copy_(items)
        strength = pc.strength()
        labels = self.buffers.precisions
        numbers = [strength.number(node, label) for node, label in zip(self._nodes, labels, strict=True)]
        self._precisions.copy_(torch.tensor(numbers, dtype=torch.float64), non_blocking=True)
        if self.buffers.signs is not None:
            self.buffers.signs.copy_(pc.steering.signs(len(self.buffers.signs), self.buffers.signs.device))

    def replay(self, pc: Recordable, inputs: Mapping[str, Any], items: Tensor | None) -> bool:
        """Take the step with another batch of the form; whether the last pass of every phase was accepted."""
        self._fill(pc, inputs, items)
        self._graph.replay()
        return not self.buffers.accepted or bool(torch.stack(self.buffers.accepted).all())

    def learned(self) -> Learned:
        """What the last replay has measured; it is there until the next one. Adds its gradients to `.grad`."""
        self._gradients.add(self._learning)
        measured, report = self._learned
        return measured, {name: v.clone() if isinstance(v, Tensor) else v for name, v in report.items()}


@contextmanager
def as_recorded(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers makes masks as it does while a step is recorded: it asks none what it holds.

    Nor does it take the positions that a model counts by itself for those of several sequences in a row, which a
    recording would mask though there is nothing to mask.
    """
    known: dict[str, Any] = {"is_tracing": lambda tensor=None: tensor is not None}
    if inputs.get("position_ids") is None and inputs.get("attention_mask") is None:
        known["find_packed_sequence_indices"] = lambda *_, **__: None
    with patch.multiple(masking_utils, **known):
        yield
