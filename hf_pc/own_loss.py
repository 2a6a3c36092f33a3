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

from hf_pc.architecture import auxiliary_loss, base_model, evaluating, plainly
from hf_pc.batch_state import copied
from hf_pc.output import IGNORED, GaussianOutput, Output
from hf_pc.processes import is_sharded
from hf_pc.rng import undrawn

SAME, OTHER_LOSS, OTHER_TASK = "the same", "another loss", "another task"
NO_LABELS, NOT_COMPARED = "no labels", "not compared"


@dataclass(frozen=True)
class Comparison:
    """How a model's own loss is to the output energy.

    Args:
        verdict: SAME; OTHER_TASK where the own loss is of labels that are aligned otherwise, so that the model would
            learn something else; OTHER_LOSS where it differs in another way; NO_LABELS or NOT_COMPARED.
        text: what differs, and what to do; or why nothing was compared.
    """

    verdict: str
    text: str = ""


def compare_with_own_loss(model: nn.Module, inputs: Mapping[str, Any], output: Output) -> Comparison:
    """Compare the energy per label with the model's own loss of a batch, in plain forward passes in evaluation mode.

    They differ where one is of shifted labels and the other is not, by a weight per class, by a second head. A
    regression's own loss is twice the energy of a Gaussian output, which is no difference. Raises nothing: what is
    wrong with a batch is said where it is learned from.
    """
    if is_sharded(model):  # a pass of its own would gather every block once more, and keep what it gathered
        return Comparison(NOT_COMPARED, "the model is sharded")
    config = getattr(base_model(model), "config", None)
    problem = getattr(config, "problem_type", None)
    with torch.no_grad(), undrawn(p.device for p in model.parameters()), evaluating(model):
        try:
            return _compared(model, inputs, output)
        except Exception as error:
            if config is not None and hasattr(config, "problem_type"):
                config.problem_type = problem  # which a loss that then failed may have guessed
            return Comparison(NOT_COMPARED, f"{type(error).__name__}: {error}")


def _compared(model: nn.Module, inputs: Mapping[str, Any], output: Output) -> Comparison:
    inputs = plainly(model, inputs)
    batch, labels = output.split(inputs)
    if not labels.ne(IGNORED).any():
        return Comparison(NO_LABELS, "every label of the batch is ignored")
    if not output.keep_labels:  # a label out of range, which the own loss meets, would end a GPU's process
        output.check(model(**copied(batch))["logits"], labels)
    found = model(**copied(inputs))
    own = found.get("loss") if isinstance(found, Mapping) else None
    if not isinstance(own, Tensor) or own.numel() != 1 or not own.is_floating_point() or not bool(own.isfinite()):
        return Comparison(NOT_COMPARED, "the model computes no finite loss of its own")
    kind = type(base_model(model)).__name__
    energy = _per_label(model, found, labels, output)
    if _equal(own, energy) or (isinstance(output, GaussianOutput) and _equal(own, 2 * energy)):
        return Comparison(SAME)
    other = replace(output, shifted=not output.shifted, virtual=0)
    if labels.dim() > 1 and _equal(own, _per_label(model, found, other.split(inputs)[1], other)):
        return Comparison(
            OTHER_TASK,
            f"{kind} computes its loss from labels {'as they are' if output.shifted else 'shifted by one'}, which its "
            f"class does not tell: set model.shifts_labels = {other.shifted} before the trainer is made",
        )
    return Comparison(
        OTHER_LOSS,
        f"{kind} computes a loss of {float(own):.4f} from this batch itself; what is learned is the output energy of "
        f"its logits, {energy:.4f} nats per label. A loss of its own, as one with weights, is not followed",
    )


def _per_label(model: nn.Module, found: Mapping[str, Any], labels: Tensor, output: Output) -> float:
    """The output energy per label, with a router's loss."""
    energy = float(output.total(found, labels).sum()) / max(1, int(labels.ne(IGNORED).sum()))
    return energy + float(auxiliary_loss(model, found))


def _equal(own: Tensor, energy: float) -> bool:
    """But for rounding, a loss in half precision being rounded itself."""
    return abs(float(own) - energy) <= (1e-4 + 4 * torch.finfo(own.dtype).eps) * max(1.0, abs(float(own)))
