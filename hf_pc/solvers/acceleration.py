"""Anderson acceleration (Walker and Ni 2011, type II) of a descent, of each sequence by itself.

A move that changed the leaves by dx and turned the direction by df tells where its like leads. Of each remembered
move such a share is taken back, dx and df both, as makes the turns cancel the present direction best: least squares in
units of the precisions.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from hf_pc.relaxation import Relaxation

#: what cosines between turns are short of: where two are parallel, only their sum is known
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
        #: of the moves before the last, the latest first: what each turned the direction by, and dx + df
        self.turns: deque[list[Tensor]] = deque(maxlen=depth - 1)
        self.returns: deque[list[Tensor]] = deque(maxlen=depth - 1)

    def steps(
        self, old: tuple[list[Tensor], list[Tensor]], new: tuple[list[Tensor], list[Tensor]], plain: Tensor
    ) -> list[Tensor]:
        """The step that each site is to make, in place of its direction.

        Args:
            old: leaves and directions of the sites before the last move; empties both.
            new: those after it. Where they are the same, the last move counts for nothing.
            plain: sequences that step along their direction, [batch].
        """
        (old_leaves, old_directions), (leaves, directions) = old, new
        shares = torch.where(plain, 0.0, self._shares(old_directions, directions))
        turns: list[Tensor] = []
        returns: list[Tensor] = []
        steps: list[Tensor] = []
        for i, site in enumerate(self.relaxation.sites):
            turn = directions[i] - old_directions.pop(0)
            back = (leaves[i] - old_leaves.pop(0)).add_(turn)
            step = directions[i]
            for share, way in zip(shares, (back, *(earlier[i] for earlier in self.returns)), strict=True):
                step = torch.addcmul(step, site.column(share), way, value=-1)
            steps.append(step)
            if self.turns.maxlen:
                turns.append(turn)
                returns.append(back)
        self.turns.appendleft(turns)
        self.returns.appendleft(returns)
        return steps

    def _shares(self, old: list[Tensor], new: list[Tensor]) -> Tensor:
        """Of each remembered move, the last one first, the share to take back, [moves, batch]: least squares."""
        batch, moves = self.relaxation.batch, 1 + len(self.turns)
        products = torch.zeros(moves * (moves + 1), batch, dtype=torch.float64, device=new[0].device)
        for i, site in enumerate(self.relaxation.sites):
            turns = [new[i] - old[i], *(turn[i] for turn in self.turns)]
            weighted = [turn * site.precision for turn in turns]
            found = [torch.linalg.vecdot(one, other) for one in weighted for other in (*turns, new[i])]
            products += torch.stack([site.per_sequence(value, batch) for value in found]).to(products)
        products = self.relaxation.share.sum(products).T.view(batch, moves, moves + 1)
        squares, against = products[..., :-1], products[..., -1]
        size = squares.diagonal(dim1=1, dim2=2).rsqrt()
        size = torch.where(size.isinf(), 0.0, size)
        cosines = squares * size[:, :, None] * size[:, None, :] * (1 - RIDGE)
        cosines.diagonal(dim1=1, dim2=2).fill_(1)
        shares = torch.linalg.solve_ex(cosines, against * size)[0] * size
        return torch.where(shares.isfinite(), shares, 0.0).T
