"""What the weights learn from: one relaxation, or several set against each other.

Learning at the equilibrium of F = L_out + sum E_l descends min_e F. To first order that is L_out - sum |g_l|^2 / 2p_l,
a reward for large gradients, which plain PC collects when it relaxes strongly. With b scaling the output energy, the
local gradient of the relaxed phase is G(b) = b grad L_out + b^2 A + b^3 B + ...; the rules below keep the first term:

- plain: G(1).
- centred: (G(1) - G(-1)) / 2, relaxing once towards the labels and once away; leaves b^2 B. The symmetric nudging of
  equilibrium propagation (Laborieux et al. 2021), benchmarked for PC in arXiv 2407.01163.
- extrapolated: C(b) = (G(b) - G(-b)) / 2b at b = 1 and 1/2, (4 C(1/2) - C(1)) / 3 (Richardson); leaves fourth order.
- mirrored: G(1) of every other sequence and -G(-1) of the rest, in one relaxation; what `centred` leaves, and the
  spread of A among sequences, which averages out over batches. (A random sign of the nudge is Laborieux et al.'s too.)
- balanced: with such signs s, (8 G(s/2) - G(s)) s / 3: of A a third is left, which averages out, and fifth order.
- one_sided: G(b) / b at several b, unless told 1, 1/2, 1/4 and 1/8, as a polynomial in b, taken to 0 (Richardson);
  of n strengths it leaves order n. Away from the labels F has no minimum once the errors are soft, which is where the
  rules above end. Towards them it has: a direction that relaxes by b s / (1 + b s) is left an error of the product of
  these over b, always under 1. So strengths further apart leave less; of the gradient, more comes from the weak ones.
- wake_sleep: G(1) less what the model's own labels teach, G(1, y') - grad L_out(y') with y' drawn from the output.
  The marginal likelihood's Laplace correction cancels the reward in expectation when the model is calibrated.

Errors at the equilibrium are a series in b too. The first phase knows its first term e0, the first move from rest,
and its sum e1; a phase that only changes b starts at b e0 + b^2 (e1 - e0), right to second order, and saves itself two
sweeps. So in units of a backprop step "centred" costs (4T - 2) / 3 from T = 3, and so does "balanced": 3.3 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Phase:
    """One relaxation of a step.

    Args:
        strength: b, the factor on the output energy.
        weight: of the phase's local gradient in the sum that the weights learn from.
        warm: errors begin where the first phase's expect them, not at rest.
        own_labels: the labels are drawn from the model's output.
        feedforward: no relaxation: the phase learns backprop's gradient.
        mirrored: every other sequence takes strength and weight with the opposite sign.
        first: a step begins with this phase, which is the one that is reported.
        last: a step ends with it.
        followed: a warm phase comes after this one, the first, whose errors tell it where to begin.
    """

    strength: float = 1.0
    weight: float = 1.0
    warm: bool = False
    own_labels: bool = False
    feedforward: bool = False
    mirrored: bool = False
    first: bool = True
    last: bool = True
    followed: bool = False

    @property
    def share(self) -> float:
        """Of grad L_out in the sum; over the phases of a rule that is 1, own labels apart."""
        return self.strength * self.weight

    def passes(self, sweeps: int) -> int:
        """Passes that this phase makes of `sweeps`: two less where it does not start at rest."""
        if self.feedforward:
            return 1
        return max(1, sweeps - 2) if self.warm else sweeps


def cost(phases: Sequence[Phase], sweeps: int) -> float:
    """Operations of a step over those of a step of backprop, if no phase ends early and no move is refused: without
    the weights' gradients, which the last pass of each phase has, a pass is two thirds of such a step."""
    return sum((2 * phase.passes(sweeps) + 1) / 3 for phase in phases)


def _step(*phases: Phase) -> tuple[Phase, ...]:
    """Phases that are gone through in this order, each told its place."""
    ends = len(phases) - 1
    warm = any(phase.warm for phase in phases)
    return tuple(replace(p, first=i == 0, last=i == ends, followed=i == 0 and warm) for i, p in enumerate(phases))


def taken_to_zero(*strengths: float) -> tuple[Phase, ...]:
    """Phases at these b whose sum is G(b) / b at b = 0, as the polynomial through them has it (Lagrange)."""
    return _step(*(
        Phase(b, prod(c / (c - b) for c in strengths if c != b) / b, warm=b != strengths[0]) for b in strengths
    ))  # fmt: skip


PLAIN = Phase()
#: the phases of each rule
RULES: dict[str, tuple[Phase, ...]] = {
    "plain": (PLAIN,),
    "centred": _step(Phase(1.0, 0.5), Phase(-1.0, -0.5, warm=True)),
    "extrapolated": _step(
        Phase(1.0, -1 / 6),
        Phase(-1.0, 1 / 6, warm=True),
        Phase(-0.5, -4 / 3, warm=True),
        Phase(0.5, 4 / 3, warm=True),
    ),
    "mirrored": (Phase(mirrored=True),),
    "balanced": _step(Phase(1.0, -1 / 3, mirrored=True), Phase(0.5, 8 / 3, warm=True, mirrored=True)),
    "one_sided": taken_to_zero(1.0, 0.5, 0.25, 0.125),
    "wake_sleep": _step(
        Phase(), Phase(1.0, -1.0, own_labels=True), Phase(1.0, 1.0, own_labels=True, feedforward=True)
    ),
}


def cancels_in_each_sequence(phases: Sequence[Phase]) -> bool:
    """Whether the bias of phases cancels in each sequence, and not only in the mean over sequences or labels."""
    return len(phases) > 1 and not any(phase.mirrored or phase.own_labels for phase in phases)


def phases_of(learning: str, strengths: Sequence[float] | None = None) -> tuple[Phase, ...]:
    """The phases of a rule; of "one_sided" at these strengths, if any are given."""
    return RULES[learning] if strengths is None else taken_to_zero(*strengths)
