"""The `error` solver: fixed-point sweeps on the errors, one pass reaching every node.

Goemaere et al., ePC, arXiv 2505.20137. A sweep moves e to e - rate * (dF/de) / p; at rate 1 a Gaussian node goes to
e = -g / p, the fixed point of its own energy. With step "auto" each sequence keeps the best errors it has met: a
sweep after which its free energy rose is refused, its rate shrinks, and the next one starts from the best again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hf_pc.node import RELAX, NodeFunction, Site
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.base import Solver, register_solver
from hf_pc.solvers.descent import Descent


@register_solver("error")
class ErrorSolver(Solver):
    """Relaxation in error coordinates; `step_size` "auto" never raises a sequence's free energy."""

    takes_phases = stores_errors = one_backward = accelerates = True

    def join(self, relaxation: Relaxation, site: Site, mu: Tensor) -> Tensor:
        if relaxation.at_rest:
            site.leaf = site.error.requires_grad_()
        site.error = site.leaf
        return NodeFunction.apply(mu, site.leaf, site, relaxation)  # type: ignore[no-any-return,no-untyped-call]

    def relax(
        self, relaxation: Relaxation, forward: Callable[[], Tensor], weight_step: Callable[[Tensor], None] | None
    ) -> Callable[[], bool]:
        if self.step_size != "auto":
            return self._relax_fixed(relaxation, forward, float(self.step_size))
        warm = relaxation.phase.warm and relaxation.sites  # LayerDrop may leave a step without any
        descent = Descent.beside_rest(relaxation, self.tolerance, self.depth) if warm else None
        for _ in range(relaxation.phase.passes(self.sweeps) - 1):
            relaxation.begin(RELAX, measures=self.tolerance > 0)
            energy = forward()
            descent = descent or Descent(relaxation, self.tolerance, self.depth, from_zero=True)
            stands = descent.judge()
            descent.move(stands, self.gradients(relaxation, energy))
            if self.converged(relaxation, descent.converged):
                break
        if descent is None:
            return lambda: True
        descent.settle()
        return descent.confirm

    def _relax_fixed(self, relaxation: Relaxation, forward: Callable[[], Tensor], step: float) -> Callable[[], bool]:
        relaxation.step_size = step
        for _ in range(relaxation.phase.passes(self.sweeps) - 1):
            relaxation.begin(RELAX, measures=self.tolerance > 0)
            gradients = self.gradients(relaxation, forward())
            for site, gradient in zip(relaxation.sites, gradients, strict=True):
                site.leaf = self.next_leaf(relaxation, site, gradient, step).requires_grad_()
            if self.converged(relaxation):
                break
        return lambda: True

    def next_leaf(self, relaxation: Relaxation, site: Site, gradient: Tensor, step: float) -> Tensor:
        """The errors of a site after a move by a fixed step."""
        return site.leaf.detach() + site.step(gradient, step)
