"""What a relaxation reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_pc.measurements import regime


@dataclass(frozen=True)
class RelaxationOutput:
    """Where a relaxation ended, as its last sweep met it.

    Attributes:
        free_energy: F, nats per label token.
        feedforward_energy: the output's energy before anything relaxed, the model's loss, nats per label token.
        energies: of each node, and of the "output", nats per label token.
        residual: |dF/de| / |g|, mean over sequences; 1 before the first move, 0 at equilibrium.
        relaxed_fraction: |g - g0| / |g0|, g the output's gradient at the last node, g0 before any state moved.
        signal_bias: how far what the last node's module learns from is from what backprop would send there, relative
            to that. All phases of the rule of `learning` count together; "plain" has one, and with Gaussian nodes and
            the solver "error" it is its relaxed_fraction. With "mirrored", "balanced" and "wake_sleep" the
            differences between sequences or labels, which average out, count too. nan where nothing was learned.
        displacement: |e| / |mu| of each node.
        sweeps: passes run, over all phases of the rule of `learning`.
        refused: share of the moves of single sequences that were refused.
        states: x = mu + e of each node, shaped as its output; of a module that runs several times in a pass
            NAME, NAME-1 and so on, here and in `errors`, `energies` and `displacement`. None of steps that are learned
            with `PCConfig.cuda_graph`.
        errors: e of each node, float32 or wider; of a model over several processes, as `states`, of the nodes here;
            and as these none with `cuda_graph`.
        sequence_free_energy: F of each sequence, nats, [batch]; where a rule takes the output energy of every other
            sequence with the opposite sign, F is what was descended, with that sign (`free_energy` is without).
    """

    free_energy: float
    feedforward_energy: float
    energies: dict[str, float]
    residual: float
    relaxed_fraction: float
    signal_bias: float
    displacement: dict[str, float]
    sweeps: int
    refused: float
    states: dict[str, Tensor]
    errors: dict[str, Tensor]
    sequence_free_energy: Tensor

    @property
    def regime(self) -> str:
        return regime(self.relaxed_fraction, self.residual)
