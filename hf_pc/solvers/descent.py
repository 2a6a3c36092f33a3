"""Descent with a guarantee: per sequence, a move after which the free energy rose is taken back.

Works on the leaves of the sites, whatever the coordinates: each sequence keeps the best leaves it has met, shrinks
its rate where a move was refused, and starts the next one from the best again.

Moves are accelerated (`hf_pc.solvers.acceleration`), but for those of a sequence that was just refused.

Sweeps may be in lower precision than the first and the last pass. Their free energies differ by the rounding of the
logits, which is no smaller where they are small: such a sweep is refused for a larger rise alone. The last pass is
compared with the first, which is as exact, so that no sequence ends above rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pc.checks import known_to_hold
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.acceleration import Acceleration

GROW, SHRINK = 1.3, 0.4

#: relative rise of F that is rounding of the forward pass, not a rise
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}
#: the same of a pass in lower precision than the first: five units of rounding, for as much the logits may move
LOWER = {torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


class Descent:
    """The best leaves of each sequence so far, and the direction down from there.

    Args:
        relaxation: whose sites move.
        tolerance: the residual under which a sequence stays where it is.
        depth: how many moves the acceleration remembers; 0 is none.
        first_rate: of each sequence's first move.
        from_zero: whether all leaves are zero before that.
    """

    def __init__(
        self, relaxation: Relaxation, tolerance: float, depth: int, first_rate: float = 1.0, *, from_zero: bool = False
    ) -> None:
        self.relaxation = relaxation
        self.tolerance = tolerance
        self.first_rate = first_rate
        self.from_zero = from_zero
        self.acceleration = Acceleration(relaxation, depth) if depth else None
        lower = relaxation.lower
        self.rounding = ROUNDING[_compute_dtype(relaxation)] if lower is None else LOWER[lower]
        self.best: list[Tensor] = []
        self.direction: list[Tensor] = []
        self.free_energy: Tensor | None = None
        self.residual: Tensor
        self.rate: Tensor

    @classmethod
    def beside_rest(cls, relaxation: Relaxation, tolerance: float, depth: int) -> Descent:
        """Of a phase that begins elsewhere than at rest: what it begins with has to be lower than rest."""
        descent = cls(relaxation, tolerance, depth)
        descent.free_energy = relaxation.rest_energy()
        descent.rate = descent.residual = torch.ones_like(descent.free_energy)
        for site in relaxation.sites:
            rest = site.leaf.detach().new_zeros(()).expand_as(site.leaf)
            descent.best.append(rest)
            descent.direction.append(rest if site.rest_move is None else site.rest_move)
            site.rest_move = None
        return descent

    def judge(self) -> Tensor:
        """Which sequences' last pass stands, [batch]; counts the refused."""
        now = self.relaxation.free_energy()
        if self.free_energy is None:
            self.free_energy = now
            self.rate = torch.full_like(now, self.first_rate)
            return torch.ones_like(now, dtype=torch.bool)
        stands = now <= self.free_energy + self.rounding * self.free_energy.abs()
        # a free energy that was never finite cannot be improved on: nothing is refused, the guard reports it
        stands |= ~self.free_energy.isfinite()
        self.relaxation.tried += len(now)
        self.relaxation.refused = self.relaxation.refused + (~stands).sum()
        self.free_energy = torch.where(stands, now, self.free_energy)
        return stands

    def move(self, stands: Tensor, gradients: list[Tensor]) -> None:
        """Keep what the sweep reached where it stands, and put the next leaves into the sites; empties `gradients`."""
        sites = self.relaxation.sites
        directions = [site.step(gradients.pop(0)) for site in sites]
        leaves = [site.leaf.detach() for site in sites]
        if self.tolerance:
            residual = self.relaxation.residual().to(stands.device)
            self.residual = torch.where(stands, residual, self.residual) if self.best else residual
        if not self.best:
            if self.relaxation.phase.followed:
                for site, direction in zip(sites, directions, strict=True):
                    site.first_move = direction
        else:
            self.rate = torch.where(stands, (self.rate * GROW).clamp(max=1.0), self.rate * SHRINK)
            if not known_to_hold(stands):
                leaves = self._mix(stands, leaves, self.best)
                directions = self._mix(stands, directions, self.direction)
        at_zero = self.from_zero and not self.best
        steps = directions
        if self.best and self.acceleration:
            steps = self.acceleration.steps((self.best, self.direction), (leaves, directions), self.rate < 1)
        self.best, self.direction = leaves, directions
        rate = self.rate
        if self.tolerance:  # a converged sequence stays
            rate = torch.where(self.converged(), 0.0, rate)
        if at_zero and self.first_rate == 1 and not self.tolerance:
            moved = [step.detach() for step in steps]
        elif known_to_hold(rate == 1):
            moved = [leaf + step for leaf, step in zip(leaves, steps, strict=True)]
        else:
            columns = self.relaxation.columns(rate)
            moved = [torch.addcmul(*terms) for terms in zip(leaves, steps, columns, strict=True)]
        for site, leaf in zip(sites, moved, strict=True):
            site.leaf = leaf.requires_grad_()

    def converged(self) -> Tensor:
        return self.residual < self.tolerance

    def _mix(self, stands: Tensor, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        columns = self.relaxation.columns(stands)
        return [torch.where(*choice) for choice in zip(columns, new, old, strict=True)]

    def confirm(self) -> bool:
        """Whether the last pass stands for every sequence; if not, the leaves are the best ones again.

        Asked again, of another pass at the same leaves, it is yes.
        """
        if not self.best:
            return True
        if self.relaxation.lower is not None:
            self._compare_with_rest()
        stands = self.judge()
        all_stand = self.relaxation.decide(stands.all())
        if not all_stand:
            self._restore(stands)
        self.best = self.direction = []  # the backward pass that follows has enough to hold
        return all_stand

    def _compare_with_rest(self) -> None:
        """What is kept are the leaves at rest: no others have been in the precision of the last pass."""
        self.free_energy = self.relaxation.rest_energy()
        self.rounding = ROUNDING[_compute_dtype(self.relaxation)]
        self.best = [leaf.new_zeros(()).expand_as(leaf) for leaf in self.best]

    def settle(self) -> None:
        """No more moves: forget what only they would need."""
        self.direction = []
        self.acceleration = None

    def _restore(self, stands: Tensor) -> None:
        """Put the best leaves back into the sites of the sequences whose last pass does not stand."""
        leaves = self._mix(stands, [site.leaf.detach() for site in self.relaxation.sites], self.best)
        for site, leaf in zip(self.relaxation.sites, leaves, strict=True):
            site.leaf = leaf.requires_grad_()


def _compute_dtype(relaxation: Relaxation) -> torch.dtype:
    """The coarsest dtype that the states of a batch pass through."""
    return max((site.dtype for site in relaxation.sites), key=lambda dtype: ROUNDING[dtype])
