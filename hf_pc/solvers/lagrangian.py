"""The `lagrangian` solver, PC-ALM (arXiv 2605.31022): a local multiplier per node accumulates the constraint error.

The augmented Lagrangian is L = L_out + sum_l lambda_l (x_l - mu_l) + p_l/2 |x_l - mu_l|^2. States go down it and the
multipliers up: lambda_l += rate * p_l (x_l - mu_l). Where both rest, x = mu holds exactly and lambda_l is minus the
gradient that backprop sends to node l, so that the local signal -(lambda + p e) becomes backprop's: strong relaxation
without its bias, from local moves only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_pc.node import Site
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.base import register_solver
from hf_pc.solvers.state import FIRST_RATE, StateSolver

if TYPE_CHECKING:
    from hf_pc.config import PCConfig


@register_solver("lagrangian")
class LagrangianSolver(StateSolver):
    """States descend and multipliers ascend the augmented Lagrangian; "auto" is a fixed step of 0.4 here."""

    #: how far a multiplier moves of what would cancel its node's own gradient
    MULTIPLIER_RATE = 0.5

    def __init__(self, config: PCConfig) -> None:
        super().__init__(config)
        if self.step_size == "auto":
            self.step_size = FIRST_RATE

    def signal(self, site: Site) -> Tensor:
        return super().signal(site) - site.multiplier

    def own_gradient(self, site: Site) -> Tensor:
        return super().own_gradient(site) + site.multiplier

    def join(self, relaxation: Relaxation, site: Site, mu: Tensor) -> Tensor:
        if relaxation.at_rest:
            site.multiplier = torch.zeros_like(site.error)
        return super().join(relaxation, site, mu)

    def moved(self, relaxation: Relaxation) -> None:
        for site in relaxation.sites:
            own = site.node.energy.grad_state(site.error, site.prediction, site.precision)
            site.multiplier = site.multiplier + self.MULTIPLIER_RATE * own
