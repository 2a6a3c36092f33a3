"""Which steps of a PCModel run normally, and which are replays of recordings (`hf_pc.cuda_graph`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import base_model, is_checkpointing, parameters_of
from hf_pc.cuda_graph import CudaGraph, Gradients, Learned, Place, Record, Recordable, Recording, Step, as_recorded
from hf_pc.energies import Energy
from hf_pc.node import Site, Strength
from hf_pc.processes import is_sharded, process_count
from hf_pc.rng import RandomState

logger = logging.getLogger(__name__)
#: steps of a form before it is recorded
WARM = 2
#: forms that are recorded; batches of others are learned without
MOST_FORMS = 16
#: of the model, after which there is a warning
MANY_CHANGES = 5
WHAT = "PCConfig.cuda_graph=True"


@dataclass
class Form:
    """Batches of one form.

    Attributes:
        seen: how many were learned without a recording.
        sites: node and label of those that fired in them.
        logits: of them, without numbers.
        plain, careful: the recordings (see `Buffers`).
        accepted: whether all last passes of the latest step were; while they are not, the careful one is replayed.
    """

    seen: int = 0
    sites: Sequence[Place] = ()
    logits: Tensor | None = None
    plain: Recording | None = None
    careful: Recording | None = None
    accepted: bool = True

    def known(self, strength: Strength) -> bool:
        """Whether every site has a precision that is one number, as none has before the first activities are known."""
        return all(strength.number(node, label) is not None for node, label in self.sites)


class Recorder:
    """Takes the steps of a PCModel, from recordings where it has them.

    Args:
        record: makes what is replayed of what is run.
        kind: of device, on which it can.
    """

    def __init__(self, record: Record = CudaGraph, kind: str = "cuda") -> None:
        self.record = record
        self.kind = kind
        self._forms: dict[Any, Form] = {}
        self._tensors: Any = None
        self._gradients = Gradients()
        self._warned = False
        self._changes = 0
        self._met: tuple[Sequence[Place], Tensor] | None = None

    def note(self, sites: Sequence[Site], logits: Tensor) -> None:
        """Note what the first phase of a step met."""
        self._met = [(site.node, site.label) for site in sites], logits.detach().to("meta")

    def step(self, pc: Recordable, step: Step, inputs: Mapping[str, Any], given: Tensor | int | None) -> Learned:
        """A step, see `Recording`; what it returns is there until the next one.

        Raises:
            ValueError: of this model or this batch no step can be recorded, or the model draws random numbers.
            RuntimeError: the model's own code asks for numbers of the GPU, so that it cannot be recorded.
        """
        _check_batch(pc, inputs)
        inputs = _without_mask(pc.model, inputs)
        items = None if given is None else torch.as_tensor(given, device=next(pc.model.parameters()).device)
        form = self._form(pc, inputs, items)
        if form is None or form.seen < WARM or not form.known(pc.strength()):
            return self._unrecorded(pc, step, inputs, items, form)
        assert form.logits is not None
        pc.output.check(form.logits, pc.output.split(inputs)[1])
        record = partial(self._recording, pc, step, inputs, items, form.sites)
        form.plain = form.plain or record(careful=False)
        recording = form.careful if form.careful is not None and not form.accepted else form.plain
        before = [buffer.clone() for buffer in recording.written]
        form.accepted = recording.replay(pc, inputs, items)
        if not form.accepted and recording is form.plain:
            for buffer, value in zip(recording.written, before, strict=True):
                buffer.copy_(value)
            recording = form.careful = form.careful or record(careful=True)
            recording.replay(pc, inputs, items)
        return recording.learned()

    def _form(self, pc: Recordable, inputs: Mapping[str, Any], items: Tensor | None) -> Form | None:
        """That of a batch; None if there are too many."""
        tensors = _tensors_of(pc.model)
        if tensors != self._tensors:  # moved, frozen, or others: what was recorded is of no use
            if self._tensors is not None:
                self._warn_of_changes(pc.model, tensors)
            self._tensors, self._gradients = tensors, Gradients()
            self._forms.clear()
        form = (
            torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
            None if items is None else items.dtype,
            *((name, value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (name, value)
              for name, value in sorted(inputs.items())),
        )  # fmt: skip
        if form not in self._forms and len(self._forms) == MOST_FORMS:
            self._warn_of_forms()
            return None
        return self._forms.setdefault(form, Form())

    def _warn_of_changes(self, model: nn.Module, tensors: list[tuple[Any, ...]]) -> None:
        """Once, where it happens again and again."""
        self._changes += 1
        if self._changes == MANY_CHANGES:
            pairs = zip(model.named_modules(), self._tensors, tensors, strict=False)
            name = next((name for (name, _), old, new in pairs if old != new), "")
            logger.warning(
                "%s: steps are recorded anew for the %dth time, as a module has other tensors, or is in another mode: "
                "%r. Where that happens all the time, steps run normally", WHAT, self._changes, name,
            )  # fmt: skip

    def _warn_of_forms(self) -> None:
        """Once."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s: batches of more than %d forms have come, and those of further ones run normally; pad to one "
                "length, or to a few", WHAT, MOST_FORMS,
            )  # fmt: skip

    def _unrecorded(
        self, pc: Recordable, step: Step, inputs: Mapping[str, Any], items: Tensor | None, form: Form | None
    ) -> Learned:
        _check_model(pc, inputs, self.kind)
        before = RandomState({p.device for p in pc.model.parameters()}, numpy=True)
        with as_recorded(inputs) if form is not None else nullcontext():  # so that what is compiled is recorded
            learned = step(inputs, items)
        if not before.holds():
            raise ValueError(
                f"{WHAT} is not allowed for a {type(base_model(pc.model)).__name__} that draws "
                "random numbers, as every step would see the same: use PCConfig.dropout='off', or set the "
                "probabilities of dropout to 0"
            )
        if form is not None and self._met is not None:
            form.seen += 1
            form.sites, form.logits = self._met
        return learned

    def _recording(
        self, pc: Recordable, step: Step, inputs: Mapping[str, Any], items: Tensor | None, sites: Sequence[Place], *,
        careful: bool,
    ) -> Recording:  # fmt: skip
        logger.info("a step over batches of %d sequences is recorded as a CUDA graph", len(inputs["labels"]))
        try:
            return Recording(
                pc, step, inputs, items, sites, gradients=self._gradients, careful=careful, record=self.record
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the step of this {type(base_model(pc.model)).__name__} cannot be recorded as a CUDA graph: {error}. "
                "Where its code asks for numbers of the GPU, or waits for it, use PCConfig.cuda_graph=False in a new "
                "process"
            ) from error


def _tensors_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a recording of a step goes by: where all tensors of the modules are, and what mode those are in."""
    found: list[tuple[Any, ...]] = []
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        found.append((module.training, *(
            (id(part), part.data_ptr(), part.shape, part.dtype, part.requires_grad)
            for part in own if isinstance(part, Tensor)
        )))  # fmt: skip
    return found


def _check_batch(pc: Recordable, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError where of this batch no step can be recorded."""
    for name, value in inputs.items():
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            found = type(value).__name__
            raise ValueError(f"{WHAT} needs inputs that are tensors or plain values; {name!r} is a {found}")
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and (pc.output.looks or labels.is_floating_point()):
        kind = type(pc.output).__name__
        raise ValueError(f"{WHAT} needs labels that are class indices; these are {labels.dtype}, of a {kind}")


def _check_model(pc: Recordable, inputs: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError where of this model no step can be recorded."""
    devices = {p.device for p in pc.model.parameters()}
    devices |= {value.device for value in inputs.values() if isinstance(value, Tensor)}
    if len(devices) > 1 or any(device.type != kind for device in devices):
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{WHAT} needs model and batch on one CUDA device, not on {found}")
    if process_count() > 1 or is_sharded(pc.model):
        raise ValueError(f"{WHAT} is not allowed with several processes, which exchange gradients inside a step")
    if is_checkpointing(pc.model):
        raise ValueError(f"{WHAT} is not allowed with activation checkpointing, which reads the generators' state")
    learning = [node.name for node in pc.nodes if type(node.energy).observe is not Energy.observe]
    if learning:
        raise ValueError(
            f"{WHAT} is not allowed with an energy that learns by itself, as that of node {learning[0]!r}"
        )


def _without_mask(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch without an attention mask that hides nothing: transformers would ask it in every pass."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return inputs
    known = parameters_of(base_model(model).forward).get("attention_mask")
    if known is None or known.default is not None or not bool(mask.all()):
        return inputs
    return {name: value for name, value in inputs.items() if name != "attention_mask"}
