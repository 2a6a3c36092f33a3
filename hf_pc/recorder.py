"""Which steps of a PCModel are told kernel by kernel, and which are played from recordings (`hf_pc.cuda_graph`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import base_model, is_checkpointing
from hf_pc.cuda_graph import CudaGraph, Learned, Record, Recording, Step
from hf_pc.energies import Energy
from hf_pc.node import Site, Strength
from hf_pc.processes import is_sharded, process_count
from hf_pc.rng import RandomState

if TYPE_CHECKING:
    from hf_pc.model import PCModel

#: steps of a form before it is recorded
WARM = 2
#: forms that are recorded; batches of others are learned without
MOST_FORMS = 16
WHAT = "PCConfig.cuda_graph=True"


@dataclass
class Form:
    """Batches of one form.

    Attributes:
        seen: how many were learned without a recording.
        sites: those that fired in them.
        logits: of them, without numbers.
        plain, careful: the recordings (see `Buffers`).
        stood: whether all last passes of the latest step stood; while they do not, the careful one is played.
    """

    seen: int = 0
    sites: Sequence[Site] = ()
    logits: Tensor | None = None
    plain: Recording | None = None
    careful: Recording | None = None
    stood: bool = True

    def known(self, strength: Strength) -> bool:
        """Whether every site has a precision that is one number, as none has before the first activities are known."""
        return all(strength.number(site.node, site.label) is not None for site in self.sites)


class Recorder:
    """Takes the steps of a PCModel, from recordings where it has them.

    Args:
        record: makes what is played of what is run.
        kind: of device, on which it can.
    """

    def __init__(self, record: Record = CudaGraph, kind: str = "cuda") -> None:
        self.record = record
        self.kind = kind
        self._forms: dict[Any, Form] = {}
        self._weights: Any = None
        self._met: tuple[Sequence[Site], Tensor] | None = None

    def note(self, sites: Sequence[Site], logits: Tensor) -> None:
        """Note what the first phase of a step met."""
        self._met = sites, logits.detach().to("meta")

    def step(self, pc: PCModel, step: Step, inputs: Mapping[str, Any], mean: Tensor | int | None) -> Learned:
        """A step, see `Recording`; what it returns is there until the next one.

        Raises:
            ValueError: of this model or this batch no step can be recorded, or the model draws random numbers.
            RuntimeError: the model's own code asks for numbers of the GPU, so that it cannot be recorded.
        """
        check_batch(inputs)
        inputs = without_mask(pc.model, inputs)
        items = None if mean is None else torch.as_tensor(mean, device=next(pc.model.parameters()).device)
        form = self._form(pc, inputs, items)
        if form is None or form.seen < WARM or not form.known(pc.strength()):
            return self._unrecorded(pc, step, inputs, items, form)
        assert form.logits is not None
        pc.output.check(form.logits, pc.output.split(inputs)[1])
        given = (pc, step, inputs, items, form.sites)
        form.plain = form.plain or self._recording(*given, careful=False)
        played = form.careful if form.careful is not None and not form.stood else form.plain
        form.stood = played.play(inputs, items)
        if not form.stood and played is form.plain:
            form.careful = form.careful or self._recording(*given, careful=True)
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

    def _unrecorded(
        self, pc: PCModel, step: Step, inputs: Mapping[str, Any], items: Tensor | None, form: Form | None
    ) -> Learned:
        check_model(pc, inputs, self.kind)
        before = RandomState({p.device for p in pc.model.parameters()}, numpy=True)
        learned = step(inputs, items)
        if not before.holds():
            raise ValueError(
                f"PCConfig.cuda_graph=True is not allowed for a {type(base_model(pc.model)).__name__} that draws "
                "random numbers, as every step would see the same: use PCConfig.dropout='off', or set the "
                "probabilities of dropout to 0"
            )
        if form is not None and self._met is not None:
            form.seen += 1
            form.sites, form.logits = self._met
        return learned

    def _recording(
        self, pc: PCModel, step: Step, inputs: Mapping[str, Any], items: Tensor | None, sites: Sequence[Site], *,
        careful: bool,
    ) -> Recording:  # fmt: skip
        try:
            return Recording(pc, step, inputs, items, sites, careful=careful, record=self.record)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"the step of this {type(base_model(pc.model)).__name__} cannot be recorded as a CUDA graph: its code "
                f"asks for numbers of the GPU, or waits for it; use PCConfig.cuda_graph=False ({error})"
            ) from error


def check_batch(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError where of this batch no step can be recorded."""
    for name, value in inputs.items():
        if not isinstance(value, (Tensor, bool, int, float, str, type(None))):
            found = type(value).__name__
            raise ValueError(f"{WHAT} needs inputs that are tensors or plain values; {name!r} is a {found}")
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(f"{WHAT} needs labels that are class indices, not {labels.dtype}")


def check_model(pc: PCModel, inputs: Mapping[str, Any], kind: str) -> None:
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


def without_mask(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch without an attention mask that hides nothing: transformers would ask it in every pass."""
    mask = inputs.get("attention_mask")
    known = inspect.signature(base_model(model).forward).parameters.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or known is None or known.default is not None:
        return inputs
    if not bool(mask.all()):
        return inputs
    return {name: value for name, value in inputs.items() if name != "attention_mask"}
