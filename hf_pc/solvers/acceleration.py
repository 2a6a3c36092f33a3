"""Anderson acceleration (Walker and Ni 2011, type II) of a descent, of each sequence by itself.

A move that changed the leaves by dx and turned the direction by df tells where its like leads. Of each remembered
move such a share is taken back, dx and df both, as makes the turns cancel the present direction best: least squares in
units of the precisions.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from hf_pc.dtypes import full_precision, sum_dtype
from hf_pc.relaxation import Relaxation

#: cosines between turns are made smaller by this: where two turns are parallel the equations stay solvable
RIDGE = 1e-7


class Acceleration:
    """The last moves of the leaves of all sites.

    Args:
        relaxation: whose sites move.
        depth: how many moves are remembered, at least 1. The last one is what lies between the leaves there were and
            the leaves there are; each of those before it is kept as two more copies of the leaves.
    """

    def __init__(self, relaxation: Relaxation, depth: int) -> None:
        self.relaxation = relaxation
        #: of the moves before the last, the latest first: df and dx + df at each site
        self.turned: deque[list[Tensor]] = deque(maxlen=depth - 1)
        self.back: deque[list[Tensor]] = deque(maxlen=depth - 1)

    def steps(
        self, old: tuple[list[Tensor], list[Tensor]], new: tuple[list[Tensor], list[Tensor]], plain: Tensor
    ) -> list[Tensor]:
        """The step that each site is to make, in place of its direction.

        Args:
            old: leaves and directions of the sites before the last move. Both lists are taken over: they become what
                is remembered of it, one site after another, so that no more than one site is held twice.
            new: those after it. Where they are the same, the last move counts for nothing.
            plain: sequences that step along their direction, [batch].
        """
        (back, turned), (leaves, directions) = old, new
        for i, (leaf, direction) in enumerate(zip(leaves, directions, strict=True)):
            turned[i] = direction - turned[i]
            back[i] = (leaf - back[i]).add_(turned[i])
        shares = torch.where(plain, 0.0, self._shares([turned, *self.turned], directions, plain.device))
        steps = list(directions)
        for share, ways in zip(shares, (back, *self.back), strict=True):
            columns = self.relaxation.columns(share)
            steps = [torch.addcmul(*terms, value=-1) for terms in zip(steps, columns, ways, strict=True)]
        self.turned.appendleft(turned)
        self.back.appendleft(back)
        return steps

    def _shares(self, moves: list[list[Tensor]], directions: list[Tensor], device: torch.device) -> Tensor:
        """Of each move, given as its turns, the share to take back, [moves, batch]: least squares."""
        batch, count = self.relaxation.batch, len(moves)
        found = [torch.zeros(count * (count + 1), batch, dtype=sum_dtype(device), device=device)]
        with full_precision(device):
            for i, site in enumerate(self.relaxation.sites):
                turns = [move[i] for move in moves]
                pairs = [torch.linalg.vecdot(one, other) for one in turns for other in (*turns, directions[i])]
                found.append(site.weighted(torch.stack(pairs), batch).to(device))
        products = self.relaxation.share.sum(torch.stack(found).sum(0)).T.view(batch, count, count + 1)
        if products.dtype != torch.float64:  # which has no digits for turns that are nearly parallel
            products = products.cpu().double()
        squares, against = products[..., :-1], products[..., -1]
        size = squares.diagonal(dim1=1, dim2=2).rsqrt()
        size = torch.where(size.isinf(), 0.0, size)
        shares = against * size
        if count > 1:  # else the only cosine is that of a turn with itself
            cosines = squares * size[:, :, None] * size[:, None, :] * (1 - RIDGE)
            cosines.diagonal(dim1=1, dim2=2).fill_(1)
            shares = torch.linalg.solve_ex(cosines, shares)[0]
        shares = shares * size
        return torch.where(shares.isfinite(), shares, 0.0).T.to(device, sum_dtype(device))
