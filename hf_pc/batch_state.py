"""What a pass over a batch leaves behind beside its outputs, so that a step of many passes leaves it once.

The running statistics of BatchNorm and InstanceNorm count a batch in the pass at rest alone, as they would in a step
of backprop: later ones see states that have seen the labels. Where nothing is learned they do not count it. What a
model writes into its inputs (Whisper masks its features in place) it writes into a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import Cache

from hf_pc.architecture import evaluating, is_checkpointing

NO_CHECKPOINTING = (
    "PCConfig.dropout='off' does without training mode, in which alone transformers checkpoints activations: use "
    "'replay', and set the probabilities of dropout to 0"
)


class RunningStatistics:
    """Those of a model's BatchNorms and InstanceNorms, which may be held as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._kept: dict[nn.Module, dict[str, Tensor | None]] = {}

    def hold(self, held: bool) -> None:
        """Whether passes in training mode leave them alone, and write to copies that are given up."""
        for norm in self._norms:
            if held and norm not in self._kept:
                self._kept[norm] = own = dict(norm._buffers)
                norm._buffers.update({name: None if part is None else part.clone() for name, part in own.items()})
            elif not held and norm in self._kept:
                norm._buffers.update(self._kept.pop(norm))


def drop_nothing(model: nn.Module) -> None:
    """Put a model into evaluation mode, but for norms with running statistics that train."""
    training = [module for module in model.modules() if module.training and isinstance(module, _NormBase)]
    model.eval()
    for module in training:
        module.train()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped. Raises ValueError where activations are checkpointed, as in training mode alone."""
    if model.training and is_checkpointing(model):
        raise ValueError(NO_CHECKPOINTING)
    with evaluating(model, drop_nothing):
        yield


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A model's inputs, with a copy of what it may write to: floating-point tensors and a cache of keys and values."""
    return {name: _copied(value) for name, value in batch.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Cache):
        return copy.deepcopy(value)
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
