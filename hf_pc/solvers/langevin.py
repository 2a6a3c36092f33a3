"""The `langevin` solver: errors drawn from their posterior, Monte Carlo PC.

Oliviers, Bogacz and Meulemans 2024, doi 10.1371/journal.pcbi.1012532. F is -log p(errors, labels), so that noise on
top of the descent makes the errors wander as their posterior has it, and what the weights learn from them is on
average the gradient of -log p(labels), the model's own likelihood. A move is

    e' = e - k (dF/de) / p + sqrt(k (2 - k) / p) n, n of unit variance,

the step of Crank and Nicolson (Cotter et al. 2013), which leaves the prior of the errors as it is at any rate k, so
that only the output's part of F is made discrete. The learning pass learns from g at the errors drawn; a move of them,
its mean at k = 1, would give the same on average and in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_pc.node import Site
from hf_pc.relaxation import Relaxation
from hf_pc.solvers.base import register_solver
from hf_pc.solvers.error import ErrorSolver

if TYPE_CHECKING:
    from hf_pc.config import PCConfig

FIRST_RATE = 0.5


@register_solver("langevin")
class LangevinSolver(ErrorSolver):
    """Errors that move as their posterior has it; `step_size` is the rate k, and "auto" is 0.5 here."""

    takes_phases = accelerates = False
    draws = True

    def __init__(self, config: PCConfig) -> None:
        super().__init__(config)
        self.step_size = _rate(config)

    @classmethod
    def check(cls, config: PCConfig) -> None:
        energies = {"PCConfig.energy": config.energy, "PCConfig.attention_energy": config.attention_energy}
        energies |= {f"NodeSpec {node.pattern!r}.energy": node.energy for node in config.specs}
        for field, energy in energies.items():
            if energy not in (None, "gaussian"):
                raise ValueError(
                    f"{field}={energy!r} is not allowed with solver='langevin', which draws Gaussian errors"
                )
        if config.relaxed_fraction is not None:
            raise ValueError(
                "PCConfig.solver='langevin' needs precision or relative_std: a steered relaxed_fraction would follow "
                "what the noise changes"
            )
        if config.tolerance:
            raise ValueError(
                f"PCConfig.tolerance={config.tolerance!r} is not allowed with solver='langevin': its errors never rest"
            )
        factor = max((node.step_factor for node in config.specs), default=1.0)
        if _rate(config) * factor >= 2:
            raise ValueError(
                f"PCConfig.step_size={config.step_size!r} times NodeSpec.step_factor={factor:g} is not allowed with "
                f"solver='langevin': it is {_rate(config) * factor:g}, and a rate under 2 is needed"
            )

    def relax(
        self, relaxation: Relaxation, forward: Callable[[], Tensor], weight_step: Callable[[Tensor], None] | None
    ) -> Callable[[], bool]:
        relaxation.steps_last = False
        return super().relax(relaxation, forward, weight_step)

    def next_leaf(self, relaxation: Relaxation, site: Site, gradient: Tensor, step: float) -> Tensor:
        rate = step * site.node.step_factor
        leaf = super().next_leaf(relaxation, site, gradient, step)
        noise = torch.empty_like(leaf).normal_(generator=relaxation.generator(leaf.device))
        return leaf + relaxation.without_padding(site, noise) * (rate * (2 - rate) / site.precision).sqrt()


def _rate(config: PCConfig) -> float:
    return FIRST_RATE if config.step_size == "auto" else float(config.step_size)  # type: ignore[arg-type]
