"""What every solver provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_pc.node import Site
from hf_pc.registry import Registry
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.optimizers import parse_optimizer

if TYPE_CHECKING:
    from hf_pc.config import PCConfig


class Solver(ABC):
    """Owns how the errors of one batch move; holds nothing of a batch itself.

    Args:
        config: `sweeps`, `step_size`, `anderson_depth`, `tolerance` and `state_optimizer` are the solver's to follow.
    """

    #: whether `state_optimizer` is followed
    takes_optimizer = False
    #: whether weights may move at every sweep
    moves_weights = False
    #: whether a step may have several phases
    takes_phases = False
    #: whether more than one move of step "auto" may be remembered
    accelerates = False
    #: whether errors are drawn, by `Relaxation.generator`
    draws = False
    #: whether leaves are errors, so that predictions may be rounded in one pass as they are not in the next
    stores_errors = False
    #: whether one `backward()` is all that goes through a learning pass's graph
    one_backward = False
    #: whether a signal comes down one node a sweep; `Site.reached` says which it has come to
    by_node = False

    def __init__(self, config: PCConfig) -> None:
        assert config.step_size is not None
        self.sweeps = config.sweeps
        self.step_size: str | float = config.step_size
        self.tolerance = config.tolerance
        self.depth = config.anderson_depth
        self.optimizer = None if config.state_optimizer is None else parse_optimizer(config.state_optimizer)

    @classmethod
    def check(cls, config: PCConfig) -> None:
        """Raise ValueError if there is what this solver cannot follow; called when a configuration is made."""

    @abstractmethod
    def join(self, relaxation: Relaxation, site: Site, mu: Tensor) -> Tensor:
        """The state that goes up from a site whose module predicted mu; makes `site.leaf` in the first pass."""

    @abstractmethod
    def relax(
        self, relaxation: Relaxation, forward: Callable[[], Tensor], weight_step: Callable[[Tensor], None] | None
    ) -> Callable[[], bool]:
        """Run every sweep but the last, and leave each site's leaf where the last sweep begins.

        Args:
            relaxation: the batch.
            forward: one pass over the network at the current errors; returns the output energy, nats, [batch].
            weight_step: moves the weights, given the loss of a pass in LEARN mode; None leaves them to the last sweep.

        A solver stops early by `converged` alone: where passes are made by all processes together (a sharded model,
        weights that move) each has to make as many.

        Returns:
            Says, called after the last pass, whether its errors stand. If it says no it has put
            back errors that do, and the pass is to be run again.
        """

    def converged(self, relaxation: Relaxation, own: Callable[[], Tensor] | None = None) -> bool:
        """Whether every sequence has come under the tolerance, on all processes; False where there is none.

        Args:
            own: which have by what the solver keeps, [batch]; None goes by the residual of the last pass.
        """
        if not self.tolerance:
            return False
        there = relaxation.residual() < self.tolerance if own is None else own()
        return relaxation.agree(bool(there.all()))

    def gradients(self, relaxation: Relaxation, output_energy: Tensor) -> list[Tensor]:
        """dF/dx of every site, from a pass in RELAX mode; zeros where a node has no way to the output."""
        found = self.found_gradients(relaxation, output_energy)
        return [torch.zeros_like(e) if g is None else g for e, g in zip(relaxation.leaves, found, strict=True)]

    def found_gradients(self, relaxation: Relaxation, output_energy: Tensor) -> Sequence[Tensor | None]:
        """What autograd finds at every site's leaf; None where it has no way to the output."""
        if not output_energy.requires_grad:  # as where LayerDrop left no block between any node and the output
            return [None] * len(relaxation.leaves)
        return torch.autograd.grad(output_energy.sum(), relaxation.leaves, allow_unused=True)

    def close(self, relaxation: Relaxation) -> None:
        """Measure what a learning pass's `backward()` has left to measure; called once after it."""

    def takes_again(self, relaxation: Relaxation, output_energy: Tensor) -> bool:
        """Whether a pass has to be run again, as it could not be differentiated; the solver has changed its ways."""
        return False

    def recover(self, relaxation: Relaxation, error: RuntimeError) -> bool:
        """Whether a pass that raised `error` can be run again, now that the solver has changed its ways."""
        return False


SOLVERS: Registry[type[Solver]] = Registry("solver")
register_solver = SOLVERS.register
