"""Whether the output energy is the loss that the model itself computes from labels.

The energy is made from the logits alone (`hf_pc.output` says why), by rules that know transformers' classes. Of a
class of the user's own, a loss function that was put in, or a head with more than one loss they may be wrong, and
nothing in a training run would show it: the baseline learns from the same energy. So the first batch is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.output import IGNORED, Output, auxiliary_loss, base_model, evaluating
from hf_pc.processes import is_sharded
from hf_pc.rng import undrawn


@dataclass(frozen=True)
class Difference:
    """What is to be said of a model whose own loss is not the output energy.

    Args:
        text: what differs, and what to do.
        other_task: the own loss is of labels that are aligned otherwise, so that the model would learn another task.
    """

    text: str
    other_task: bool


def difference(model: nn.Module, inputs: Mapping[str, Any], output: Output) -> Difference | None:
    """Compare the energy per label with the model's own loss of a batch, in plain forward passes in evaluation mode.

    They differ where one is of shifted labels and the other is not, by a weight per class, by a second head. A
    regression's own loss is twice the energy of a Gaussian output, which is no difference. None too where there is
    nothing to compare: a model that returns no loss or cannot take the batch, a batch without labels, a sharded model.
    """
    if is_sharded(model):  # a pass of its own would gather every block once more, and keep what it gathered
        return None
    with torch.no_grad(), undrawn(p.device for p in model.parameters()), evaluating(model):
        try:
            batch, labels = output.split(inputs)
            output.check(model(**batch)["logits"], labels)  # a label out of range would end a GPU's process
            found = model(**inputs)
        except Exception:  # said where it is learned from
            return None
    own = found.get("loss") if isinstance(found, Mapping) else None
    if not isinstance(own, Tensor) or own.numel() != 1 or not bool(own.isfinite()):
        return None
    kind = type(base_model(model)).__name__
    energy = _per_label(model, found, inputs, output)
    factors = (1.0,) if output.has_perplexity else (1.0, 2.0)
    if energy is None or any(_equal(own, factor * energy) for factor in factors):
        return None
    other = _per_label(model, found, inputs, replace(output, shifted=not output.shifted, virtual=0))
    if other is not None and _equal(own, other):
        said, wanted = ("as they are", "ForMaskedLM") if output.shifted else ("shifted by one", "ForCausalLM")
        return Difference(
            f"{kind} computes its loss from labels {said}, which its class does not tell: set "
            f"model.loss_type={wanted!r} before the trainer is made", True
        )  # fmt: skip
    return Difference(
        f"{kind} computes a loss of {float(own):.4f} from this batch itself; what is learned is the output energy of "
        f"its logits, {float(energy):.4f} nats per label. A loss of its own, as one with weights, is not followed",
        False,
    )


def _per_label(model: nn.Module, found: Mapping[str, Any], inputs: Mapping[str, Any], output: Output) -> Tensor | None:
    """The output energy per label, with a router's loss; None where there are no labels, or none that fit."""
    try:
        labels = output.split(inputs)[1]
        tokens = labels.ne(IGNORED).sum()
        if not tokens:
            return None
        energy: Tensor = output.total(found, labels).sum() / tokens + auxiliary_loss(model, found)
        return energy
    except ValueError:  # said where it is learned from
        return None


def _equal(own: Tensor, energy: Tensor) -> bool:
    """But for rounding, a loss in half precision being rounded itself."""
    return abs(float(own) - float(energy)) <= (1e-4 + 4 * torch.finfo(own.dtype).eps) * max(1.0, abs(float(own)))
