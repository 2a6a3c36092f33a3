"""The signal g that reaches the top node, the one that the output follows: how far relaxation changes it, and how far
what the node's module learns from, over all phases of a step, is from what backprop would send there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pc.dtypes import exact


class TopSignal:
    """That of one phase, in nats times the phase's strength.

    Args:
        before: that of the phase before, of the same step.
    """

    def __init__(self, before: TopSignal | None = None) -> None:
        self._at_rest: Tensor | None = None
        #: the same of the first phase, whose strength is 1
        self._feedforward: Tensor | None = None if before is None else before._feedforward
        self._learned_before: Tensor | None = None if before is None else before._learned
        self._learned: Tensor | None = None
        self.change = self.reference = torch.zeros((), dtype=torch.float64)

    def begin_where(self, before: TopSignal, ratio: float) -> None:
        """Take what another phase, of so much less strength, found at rest."""
        self._at_rest = None if before._at_rest is None else ratio * before._at_rest
        self.reference = ratio**2 * before.reference

    def note(self, signal: Tensor) -> None:
        """Note the signal of a pass, of which the first is at rest."""
        if self._at_rest is None:
            self._at_rest = signal.detach()
            if self._feedforward is None:
                self._feedforward = self._at_rest
            self.reference = exact(torch.linalg.vector_norm(signal)).square()
        else:
            self.change = exact(torch.linalg.vector_norm(signal - self._at_rest)).square()

    def note_learned(self, signal: Tensor, weight: float) -> None:
        """Note what the top node's module learns from in this phase, and the phase's weight in the step."""
        learned = weight * signal.detach()
        self._learned = learned if self._learned_before is None else self._learned_before + learned

    def bias(self) -> Tensor:
        """|what was learned from - g of a feedforward pass|^2, over all phases so far."""
        if self._learned is None or self._feedforward is None:
            return torch.zeros((), dtype=torch.float64)
        bias = torch.linalg.vector_norm(self._learned - self._feedforward)
        return exact(bias).square()
