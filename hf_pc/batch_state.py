"""What a pass over a batch leaves behind beside its outputs, so that a step of many passes leaves it once.

The running statistics of BatchNorm and InstanceNorm count a batch in the pass at rest alone, as they would in a step
of backprop: later ones see states that have seen the labels. Where nothing is learned they do not count it. What a
model writes into its inputs (Whisper masks its features in place) it writes into a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from transformers import Cache

NO_CHECKPOINTING = (
    "PCConfig.dropout='off' does without training mode, in which alone transformers checkpoints activations: use "
    "'replay', and set the probabilities of dropout to 0"
)


class RunningStatistics:
    """Those of a model's BatchNorms and InstanceNorms, which may be held as they are."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._norms = [norm for norm in norms if isinstance(norm, _BatchNorm)]
        #: these update theirs whatever is told: while they are held they have copies to do it with
        self._instance_norms = [norm for norm in norms if not isinstance(norm, _BatchNorm)]
        self._kept: dict[nn.Module, tuple[Tensor | None, Tensor | None]] = {}

    def hold(self, held: bool) -> None:
        """Whether passes in training mode leave them alone; they normalise by the batch all the same."""
        for batch_norm in self._norms:
            batch_norm.track_running_stats = not held
        for norm in self._instance_norms:
            if held and norm not in self._kept:
                self._kept[norm] = own = norm.running_mean, norm.running_var
                norm.running_mean, norm.running_var = (None if part is None else part.clone() for part in own)
            elif not held and norm in self._kept:
                norm.running_mean, norm.running_var = self._kept.pop(norm)


def drop_nothing(model: nn.Module) -> None:
    """Put a model into evaluation mode, but for norms with running statistics that train."""
    training = [module for module in model.modules() if module.training and isinstance(module, _NormBase)]
    model.eval()
    for module in training:
        module.train()


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A model's inputs, with a copy of what it may write to: floating-point tensors and a cache of keys and values."""
    return {name: _copied(value) for name, value in batch.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Cache):
        return copy.deepcopy(value)
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
