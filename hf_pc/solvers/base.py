"""What every solver provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from hf_pc.registry import Registry
from hf_pc.relaxation import Relaxation


class Solver(ABC):
    """Owns how the errors of one batch move; holds nothing of a batch itself.

    Args:
        sweeps: passes over the network per step, the learning pass included.
        step_size: "auto", or a number in units of 1/precision.
        tolerance: a sequence whose residual is under this stops moving.
    """

    def __init__(self, sweeps: int, step_size: str | float, tolerance: float) -> None:
        self.sweeps = sweeps
        self.step_size = step_size
        self.tolerance = tolerance

    @abstractmethod
    def relax(self, relaxation: Relaxation, forward: Callable[[], Tensor]) -> Callable[[Tensor], bool]:
        """Run every sweep but the last, and leave each site's error where the last sweep begins.

        Args:
            relaxation: the batch.
            forward: one pass over the network at the current errors; returns the output energy, nats, [batch].

        Returns:
            A function of the last pass's output energy that says whether its errors stand. If it says no it has put
            back errors that do, and the pass is to be run again.
        """


SOLVERS: Registry[type[Solver]] = Registry("solver")
register_solver = SOLVERS.register
