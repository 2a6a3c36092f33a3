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

A step is recorded after `WARM` steps of its form that Python told: those compile and tune what is to be recorded. The
alternative, graphs of single blocks as `torch.compile` makes them ("reduce-overhead"), leaves what lies between blocks
to Python, which is as much again, and keeps what a later pass would overwrite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import masking_utils

from hf_pc.architecture import base_model, is_checkpointing
from hf_pc.energies import Energy
from hf_pc.node import Site
from hf_pc.processes import is_sharded, process_count
from hf_pc.rng import RandomState

if TYPE_CHECKING:
    from hf_pc.model import PCModel

#: steps of a form before it is recorded
WARM = 2
#: forms that are recorded; batches of others are learned without
MOST_FORMS = 16

#: of each phase what was measured, and tensors to report
Learned = tuple[list[dict[str, Tensor]], dict[str, Any]]
#: a step, given its inputs and what the gradient is a mean over
Step = Callable[[Mapping[str, Any], Tensor | int | None], Learned]


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
    """What `run` tells the GPU, to be told again."""

    #: those that there are, whose memory all use in turn
    _others: ClassVar[WeakSet[CudaGraph]] = WeakSet()
    _graph: torch.cuda.CUDAGraph

    def __init__(self, run: Callable[[], None]) -> None:
        pool = next((other._graph.pool() for other in CudaGraph._others), None)
        self._graph = torch.cuda.CUDAGraph()
        # other threads may pin memory meanwhile, as those of data loaders do
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            run()
        CudaGraph._others.add(self)

    def play(self) -> None:
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
        careful: bool, record: Callable[[Callable[[], None]], Any],
    ) -> None:  # fmt: skip
        self._pc = pc
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._items = None if items is None else items.clone()
        device = next(pc.model.parameters()).device
        labels = [site.label for site in sites]
        self._nodes = [site.node for site in sites]
        self._precisions = torch.empty(len(sites), dtype=torch.float64, device=device)
        signs = (
            torch.empty(len(inputs["labels"]), device=device) if any(phase.mirrored for phase in pc.phases) else None
        )
        self.buffers = Buffers(dict(zip(labels, self._precisions.unbind(), strict=True)), signs, careful)
        self._learned: Learned
        self._fill(inputs, items)

        def run() -> None:
            self._learned = step(self._inputs, self._items)

        weights = list(pc.model.parameters())
        before = [weight.grad for weight in weights]
        try:
            for weight in weights:
                weight.grad = None
            with pc.recorded(self.buffers), unpacked(self._inputs):
                self._played = record(run)
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


@dataclass
class Form:
    """Batches of one form: how many were learned without a recording, and the recordings.

    The careful one is played again as long as there are last passes that do not stand.
    """

    seen: int = 0
    stood: bool = True
    plain: Recording | None = None
    careful: Recording | None = None


class Recorder:
    """Takes the steps of a PCModel, from recordings where it has them.

    Args:
        record: makes what is played of what is run.
        kind: of device, on which it can.
    """

    def __init__(self, record: Callable[[Callable[[], None]], Any] = CudaGraph, kind: str = "cuda") -> None:
        self.record = record
        self.kind = kind
        self._forms: dict[Any, Form] = {}
        self._weights: Any = None
        self._sites: Sequence[Site] = ()
        self._logits: Tensor

    def note(self, sites: Sequence[Site], logits: Tensor) -> None:
        """Note what the first phase of a step met."""
        self._sites = sites
        self._logits = logits.detach().to("meta")

    def step(self, pc: PCModel, step: Step, inputs: Mapping[str, Any], mean: Tensor | int | None) -> Learned:
        """A step, see `Recording`; what it returns is there until the next one.

        Raises:
            ValueError: of this model or this batch no step can be recorded, or the model draws random numbers.
            RuntimeError: the model's own code asks for numbers of the GPU, so that it cannot be recorded.
        """
        check(pc, inputs, self.kind)
        inputs = without_mask(pc.model, inputs)
        items = None if mean is None else torch.as_tensor(mean, device=next(pc.model.parameters()).device)
        form = self._form(pc, inputs, items)
        if form is None or form.seen < WARM or not self._known(pc):
            return self._unrecorded(pc, step, inputs, items, form)
        _, labels = pc.output.split(inputs)
        pc.output.check(self._logits, labels)
        form.plain = form.plain or self._recording(pc, step, inputs, items, careful=False)
        played = form.careful if form.careful is not None and not form.stood else form.plain
        form.stood = played.play(inputs, items)
        if not form.stood and played is form.plain:
            form.careful = form.careful or self._recording(pc, step, inputs, items, careful=True)
            played = form.careful
            played.play(inputs, items)
        return played.learned()

    def _form(self, pc: PCModel, inputs: Mapping[str, Any], items: Tensor | None) -> Form | None:
        """That of a batch; None if there are too many."""
        weights = tuple((id(p), p.data_ptr(), p.requires_grad) for p in pc.model.parameters())
        if weights != self._weights:  # moved, frozen, or others: what was recorded is of no use
            self._weights = weights
            self._forms.clear()
        form = (
            pc.model.training, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
            None if items is None else items.dtype,
            *((name, v.shape, v.dtype) if isinstance(v, Tensor) else (name, v) for name, v in sorted(inputs.items())),
        )  # fmt: skip
        if form not in self._forms and len(self._forms) == MOST_FORMS:
            return None
        return self._forms.setdefault(form, Form())

    def _known(self, pc: PCModel) -> bool:
        """Whether every site has a precision that is one number, as none has before the first activities are known."""
        strength = pc.strength()
        return all(strength.number(site.node, site.label) is not None for site in self._sites)

    def _unrecorded(
        self, pc: PCModel, step: Step, inputs: Mapping[str, Any], items: Tensor | None, form: Form | None
    ) -> Learned:
        before = RandomState({p.device for p in pc.model.parameters()}, numpy=False)
        learned = step(inputs, items)
        if not before.holds():
            raise ValueError(
                f"PCConfig.cuda_graph=True is not allowed for a {type(base_model(pc.model)).__name__} that draws "
                "random numbers, as every step would see the same: use PCConfig.dropout='off', or set the "
                "probabilities of dropout to 0"
            )
        if form is not None:
            form.seen += 1
        return learned

    def _recording(
        self, pc: PCModel, step: Step, inputs: Mapping[str, Any], items: Tensor | None, *, careful: bool
    ) -> Recording:
        try:
            return Recording(pc, step, inputs, items, self._sites, careful=careful, record=self.record)
        except RuntimeError as error:
            raise RuntimeError(
                f"the step of this {type(base_model(pc.model)).__name__} cannot be recorded as a CUDA graph: its code "
                f"asks for numbers of the GPU, or waits for it; use PCConfig.cuda_graph=False ({error})"
            ) from error


def check(pc: PCModel, inputs: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError where no step can be recorded."""
    parameters = list(pc.model.parameters())
    devices = {p.device for p in parameters}
    devices |= {value.device for value in inputs.values() if isinstance(value, Tensor)}
    what = "PCConfig.cuda_graph=True"
    if len(devices) > 1 or any(device.type != kind for device in devices):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{what} needs model and batch on one CUDA device, not on {found}")
    if process_count() > 1 or is_sharded(pc.model):
        raise ValueError(f"{what} is not allowed with several processes, which exchange gradients inside a step")
    if is_checkpointing(pc.model):
        raise ValueError(f"{what} is not allowed with activation checkpointing, which reads the generators' state")
    learning = [node.name for node in pc.nodes if type(node.energy).observe is not Energy.observe]
    if learning:
        raise ValueError(
            f"{what} is not allowed with an energy that learns by itself, as that of node {learning[0]!r}"
        )
    for name, value in inputs.items():
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            found = type(value).__name__
            raise ValueError(f"{what} needs inputs that are tensors or plain values; {name!r} is a {found}")
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(f"{what} needs labels that are class indices, not {labels.dtype}")


def without_mask(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch without an attention mask that hides nothing: transformers would ask it in every pass."""
    mask = inputs.get("attention_mask")
    known = inspect.signature(base_model(model).forward).parameters.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or known is None or known.default is not None:
        return inputs
    if not bool(mask.all()):
        return inputs
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


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
