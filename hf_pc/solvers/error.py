"""The `error` solver: fixed-point sweeps on the errors, one pass reaching every node.

Goemaere et al., ePC, arXiv 2505.20137. A sweep moves e to e - rate * (dF/de) / p; at rate 1 a Gaussian node goes to
e = -g / p, the fixed point of its own energy. With step "auto" each sequence keeps the best errors it has met: a
sweep after which its free energy rose is refused, its rate shrinks, and the next one starts from the best again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_pc.node import RELAX, Site
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.base import Solver, register_solver

GROW, SHRINK = 1.3, 0.4

#: relative rise of F that is rounding of the forward pass, not a rise
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}


def _per_sequence(values: Tensor, site: Site, batch: int) -> Tensor:
    """[batch] spread over a site's leading dimensions: a column that broadcasts against its error."""
    rows = values.to(site.error.device).repeat_interleave(len(site.error) // batch)
    return rows.view(-1, *[1] * (site.error.dim() - 1))


class _Descent:
    """The best errors of each sequence so far, and the direction down from there."""

    def __init__(self, relaxation: Relaxation, tolerance: float, rounding: float) -> None:
        self.relaxation = relaxation
        self.tolerance = tolerance
        self.rounding = rounding
        self.best: list[Tensor] = []
        self.direction: list[Tensor] = []
        self.free_energy: Tensor | None = None
        self.residual: Tensor
        self.rate: Tensor

    def judge(self) -> Tensor:
        """Which sequences' last pass stands, [batch]; counts the refused."""
        now = self.relaxation.free_energy()
        if self.free_energy is None:
            self.free_energy = now
            self.rate = torch.ones_like(now)
            return torch.ones_like(now, dtype=torch.bool)
        stands = now <= self.free_energy + self.rounding * self.free_energy.abs()
        # a free energy that was never finite cannot be improved on: nothing is refused, the guard reports it
        stands |= ~self.free_energy.isfinite()
        self.relaxation.tried += len(now)
        self.relaxation.refused = self.relaxation.refused + (~stands).sum().cpu()
        self.free_energy = torch.where(stands, now, self.free_energy)
        return stands

    def accept(self, stands: Tensor, gradients: list[Tensor]) -> None:
        """Keep what the sweep reached where it stands, and adapt the rates."""
        sites, batch = self.relaxation.sites, self.relaxation.batch
        directions = [-gradient / site.precision for site, gradient in zip(sites, gradients, strict=True)]
        errors = [site.error.detach() for site in sites]
        residual = self.relaxation.residual().to(stands.device)
        if not self.best:
            self.best, self.direction, self.residual = errors, directions, residual
        else:
            if bool(stands.all()):
                self.best, self.direction = errors, directions
            else:
                columns = [_per_sequence(stands, site, batch) for site in sites]
                self.best = [torch.where(c, n, b) for c, n, b in zip(columns, errors, self.best, strict=True)]
                self.direction = [
                    torch.where(c, n, b) for c, n, b in zip(columns, directions, self.direction, strict=True)
                ]
            self.residual = torch.where(stands, residual, self.residual)
            self.rate = torch.where(stands, (self.rate * GROW).clamp(max=1.0), self.rate * SHRINK)

    def converged(self) -> Tensor:
        return self.residual < self.tolerance

    def propose(self) -> None:
        """Put the next errors into the sites: best + rate * direction; a converged sequence stays."""
        rate = torch.where(self.converged(), torch.zeros_like(self.rate), self.rate)
        full = bool((rate == 1).all())
        for site, best, direction in zip(self.relaxation.sites, self.best, self.direction, strict=True):
            if not full:
                direction = direction * _per_sequence(rate, site, self.relaxation.batch).to(direction.dtype)
            site.error = (best + direction).requires_grad_()

    def restore(self, stands: Tensor) -> None:
        """Put the best errors back into the sites of the sequences whose last pass does not stand."""
        for site, best in zip(self.relaxation.sites, self.best, strict=True):
            keep = _per_sequence(stands, site, self.relaxation.batch)
            site.error = torch.where(keep, site.error.detach(), best).requires_grad_()


@register_solver("error")
class ErrorSolver(Solver):
    """Relaxation in error coordinates; `step_size` "auto" never raises a sequence's free energy."""

    def relax(self, relaxation: Relaxation, forward: Callable[[], Tensor]) -> Callable[[Tensor], bool]:
        if self.step_size != "auto":
            return self._relax_fixed(relaxation, forward, float(self.step_size))
        descent: _Descent | None = None
        for _ in range(self.sweeps - 1):
            energy = self._pass(relaxation, forward)
            if descent is None:
                descent = _Descent(relaxation, self.tolerance, ROUNDING[_compute_dtype(relaxation)])
            stands = descent.judge()
            descent.accept(stands, _gradients(relaxation, energy))
            descent_done = bool(descent.converged().all())
            descent.propose()
            if descent_done:
                break

        def confirm(output_energy: Tensor) -> bool:
            if descent is None:
                return True
            stands = descent.judge()
            if bool(stands.all()):
                return True
            descent.restore(stands)
            return False

        return confirm

    def _relax_fixed(
        self, relaxation: Relaxation, forward: Callable[[], Tensor], step: float
    ) -> Callable[[Tensor], bool]:
        relaxation.step_size = step
        for _ in range(self.sweeps - 1):
            gradients = _gradients(relaxation, self._pass(relaxation, forward))
            for site, gradient in zip(relaxation.sites, gradients, strict=True):
                site.error = (site.error.detach() - step * gradient / site.precision).requires_grad_()
            if bool((relaxation.residual() < self.tolerance).all()):
                break

        def confirm(output_energy: Tensor) -> bool:
            return True

        return confirm

    @staticmethod
    def _pass(relaxation: Relaxation, forward: Callable[[], Tensor]) -> Tensor:
        relaxation.begin(RELAX)
        return forward()


def _gradients(relaxation: Relaxation, output_energy: Tensor) -> list[Tensor]:
    """dF/de of every site; zeros where a node has no way to the output (its error never leaves zero then)."""
    errors = relaxation.errors
    found = torch.autograd.grad(output_energy.sum(), errors, allow_unused=True)
    return [torch.zeros_like(e) if g is None else g for e, g in zip(errors, found, strict=True)]


def _compute_dtype(relaxation: Relaxation) -> torch.dtype:
    """The coarsest dtype that the states of a batch pass through."""
    return max((site.dtype for site in relaxation.sites), key=lambda dtype: ROUNDING[dtype])
