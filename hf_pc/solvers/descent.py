"""Descent with a guarantee: per sequence, a move after which the free energy rose is taken back.

Works on the leaves of the sites, whatever the coordinates: each sequence keeps the best leaves it has met, shrinks
its rate where a move was refused, and starts the next one from the best again.

Moves are Anderson-accelerated (Walker and Ni 2011, type II): of the last few moves that stood, those combinations are
taken back whose directions would cancel the present one. A sequence that was just refused moves plainly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pc.node import Site
from hf_pc.relaxation import Relaxation

GROW, SHRINK = 1.3, 0.4
#: moves that acceleration looks back on, and the share of their squares that keeps their equations solvable
DEPTH, RIDGE = 2, 1e-6

#: relative rise of F that is rounding of the forward pass, not a rise
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 5e-4}


def _per_sequence(values: Tensor, site: Site, batch: int) -> Tensor:
    """[batch] spread over a site's leading dimensions: a column that broadcasts against its error."""
    rows = values.to(site.leaf.device).repeat_interleave(len(site.leaf) // batch)
    return rows.view(-1, *[1] * (site.leaf.dim() - 1))


class Descent:
    """The best leaves of each sequence so far, and the direction down from there."""

    def __init__(self, relaxation: Relaxation, tolerance: float, first_rate: float = 1.0) -> None:
        self.relaxation = relaxation
        self.tolerance = tolerance
        self.first_rate = first_rate
        self.rounding = ROUNDING[_compute_dtype(relaxation)]
        self.best: list[Tensor] = []
        self.direction: list[Tensor] = []
        self.past: list[tuple[list[Tensor], list[Tensor]]] = []  # differences of best and of direction, newest last
        self.free_energy: Tensor | None = None
        self.residual: Tensor
        self.rate: Tensor

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
        self.relaxation.refused = self.relaxation.refused + (~stands).sum().cpu()
        self.free_energy = torch.where(stands, now, self.free_energy)
        return stands

    def accept(self, stands: Tensor, gradients: list[Tensor]) -> None:
        """Keep what the sweep reached where it stands, and adapt the rates."""
        sites, batch = self.relaxation.sites, self.relaxation.batch
        directions = [-site.step(gradient) for site, gradient in zip(sites, gradients, strict=True)]
        leaves = [site.leaf.detach() for site in sites]
        residual = self.relaxation.residual().to(stands.device)
        if not self.best:
            self.best, self.direction, self.residual = leaves, directions, residual
        else:
            before = self.best, self.direction
            if bool(stands.all()):
                self.best, self.direction = leaves, directions
            else:
                columns = [_per_sequence(stands, site, batch) for site in sites]
                self.best = [torch.where(c, n, b) for c, n, b in zip(columns, leaves, self.best, strict=True)]
                self.direction = [
                    torch.where(c, n, b) for c, n, b in zip(columns, directions, self.direction, strict=True)
                ]
            moved = [new - old for new, old in zip(self.best, before[0], strict=True)]
            turned = [new - old for new, old in zip(self.direction, before[1], strict=True)]
            self.past = [*self.past, (moved, turned)][-DEPTH:]
            self.residual = torch.where(stands, residual, self.residual)
            self.rate = torch.where(stands, (self.rate * GROW).clamp(max=1.0), self.rate * SHRINK)

    def converged(self) -> Tensor:
        return self.residual < self.tolerance

    def propose(self) -> None:
        """Put the next leaves into the sites: best + rate * accelerated direction; a converged sequence stays."""
        rate = torch.where(self.converged(), torch.zeros_like(self.rate), self.rate)
        full = bool((rate == 1).all())
        back = self._combination()
        for i, (site, best, direction) in enumerate(
            zip(self.relaxation.sites, self.best, self.direction, strict=True)
        ):
            for share, (moved, turned) in zip(back, self.past, strict=True):
                column = _per_sequence(share, site, self.relaxation.batch).to(direction.dtype)
                direction = direction - column * (moved[i] + turned[i])
            if not full:
                direction = direction * _per_sequence(rate, site, self.relaxation.batch).to(direction.dtype)
            site.leaf = (best + direction).requires_grad_()

    def _combination(self) -> list[Tensor]:
        """Of each past move, the share to take back, [batch]: least squares of the direction on its differences."""
        if not self.past:
            return []
        rows = [turned for _, turned in self.past] + [self.direction]
        sites, batch = self.relaxation.sites, self.relaxation.batch
        size = len(rows)
        products = torch.zeros(batch, size, size, dtype=torch.float64, device=self.rate.device)
        for i, site in enumerate(sites):
            weighted = [(row[i] * site.precision.sqrt()).reshape(batch, -1) for row in rows]
            stacked = torch.stack(weighted, 1)
            products += (stacked @ stacked.transpose(1, 2)).to(products)
        gram, right = products[:, :-1, :-1], products[:, :-1, -1]
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(size - 1, dtype=torch.float64, device=gram.device)
        shares = torch.linalg.solve(gram + ridge[:, None, None] * eye, right)
        plain = (self.rate < 1) | ~shares.isfinite().all(1)
        return list(torch.where(plain[:, None], 0.0, shares).unbind(1))

    def confirm(self) -> bool:
        """Whether the last pass stands for every sequence; if not, the leaves are the best ones again."""
        stands = self.judge()
        if bool(stands.all()):
            return True
        self._restore(stands)
        return False

    def _restore(self, stands: Tensor) -> None:
        """Put the best leaves back into the sites of the sequences whose last pass does not stand."""
        for site, best in zip(self.relaxation.sites, self.best, strict=True):
            keep = _per_sequence(stands, site, self.relaxation.batch)
            site.leaf = torch.where(keep, site.leaf.detach(), best).requires_grad_()


def _compute_dtype(relaxation: Relaxation) -> torch.dtype:
    """The coarsest dtype that the states of a batch pass through."""
    return max((site.dtype for site in relaxation.sites), key=lambda dtype: ROUNDING[dtype])
