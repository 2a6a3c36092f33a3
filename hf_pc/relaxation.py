"""The relaxation of one batch: its sites, and what each pass over the network measures.

All sums are kept per sequence while a batch relaxes, since the sequences of a batch are independent, and added up
once at the end. Nothing is divided by a number of tokens here: `summary` reports nats per token, and the training
loss is divided once, by whoever knows how many tokens the whole optimiser step has.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.dtypes import exact, sum_dtype, wide
from hf_pc.learning import PLAIN, Phase
from hf_pc.measurements import OUTPUT_LABEL, on_cpu, residual
from hf_pc.node import LEARN, RELAX, Boundary, LossScale, Node, Site, Strength
from hf_pc.padding import Padding
from hf_pc.top_signal import TopSignal

#: between the seeds of two devices: those of processes are one apart, and a CPU's generator knows 32 bits of a seed
DEVICE_STRIDE = 1_000_003


class Share:
    """Which part of the nodes this process relaxes: all of them. In `hf_pc.distributed` each process has a part."""

    #: whether the node that the output follows is among them
    top = True
    #: processes that have a part each
    count = 1
    #: whether the model was taken apart, so that its head reads the last state and nothing else
    apart = False

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the nodes here made sums over all nodes."""
        return values

    def merge(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """`Relaxation.sums` of the nodes here made those of all nodes."""
        return sums


class Relaxation:
    """States and errors of one batch.

    Args:
        batch: number of sequences.
        tokens: number of label tokens, a scalar tensor.
        strength: how strongly errors are penalised.
        join: the solver's: what goes up from a site whose module predicted mu.
        phase: the strength of the output energy, and how the errors start.
        before: the relaxation of the phase before, of the same batch.
        signs: +1 or -1, [batch], on the output energy of each sequence and on what is learned from it; None is +1.
        share: which part of the nodes is relaxed here.
    """

    def __init__(
        self,
        batch: int,
        tokens: Tensor,
        strength: Strength,
        join: Callable[[Relaxation, Site, Tensor], Tensor],
        phase: Phase = PLAIN,
        before: Relaxation | None = None,
        signs: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        self.batch = batch
        self.share = share or Share()
        self.boundary: Boundary | None = None  # the state of another process that the first module here predicts from
        self.phase = phase
        self.signs = signs
        self._join = join
        self.tokens = tokens
        self.padding = Padding()
        self._strength = strength
        self.sites: list[Site] = []
        self._of_node: dict[str, list[Site]] = {}
        self._visits: dict[str, int] = {}
        self.mode = RELAX
        self.measures = True  # whether the present pass measures g and dF/dx
        self.pieces = True  # whether pieces of the graph may be differentiated one by one, before `backward()`
        self.weights: list[Tensor] = []  # what may learn
        self._held: dict[Tensor, Tensor] = {}
        self.lower: torch.dtype | None = None  # of passes between the first and the last, if not that of those two
        #: whether what holds here does so on every process, where passes are made by all of them together
        self.agree: Callable[[bool], bool] = lambda holds: holds
        #: what is taken for the answer whether the last pass stands for all sequences; only to ask waits for a GPU
        self.decide: Callable[[Tensor], bool] = bool
        self.defers = False  # whether the first node's module is left to learn in a later phase
        self.step_size = 1.0
        self.steps_last = not phase.feedforward  # whether the learning pass takes the last step
        self.seed: int | None = None  # of what is drawn
        self._generators: dict[torch.device, torch.Generator] = {}
        self.scale: Tensor | float = 1.0
        self.sweeps = 0
        self.tried = 0
        self.refused = torch.zeros((), dtype=torch.int64)
        self.output_energy: Tensor | None = None  # nats times strength, without signs, [batch], of the last pass
        self.feedforward_energy: Tensor | None = None  # the same of the first pass, where every error is zero
        self.top_signal: TopSignal = TopSignal(None if before is None else before.top_signal)
        #: if a dictionary, states x of the passes to come are put there, by the label of their site
        self.states: dict[str, Tensor] | None = None
        if before is not None and phase.warm:
            self._continue(before)

    def _continue(self, before: Relaxation) -> None:
        """Start where the series of the first phase's errors in the strength points to."""
        self.sites, self._of_node = before.sites, before._of_node
        b = self.phase.strength  # that of the first phase is 1
        for site in self.sites:
            site.rest_move = None if site.first_move is None else b * site.first_move
            if site.rest_move is None or site.last_move is None:  # one sweep: the first phase never left its rest
                site.leaf = torch.zeros_like(site.leaf).requires_grad_()
            else:
                start = torch.lerp(site.rest_move, b * site.last_move, b)
                # a gradient that overflowed in mixed precision is the scaler's matter: its errors start at rest
                site.leaf = torch.where(start.isfinite(), start, 0.0).requires_grad_()
            if self.phase.last:
                site.first_move = site.last_move = None
        ratio = b / before.phase.strength
        assert before.feedforward_energy is not None
        self.feedforward_energy = ratio * before.feedforward_energy
        self.top_signal.begin_where(before.top_signal, ratio)

    def rests(self, site: Site) -> bool:
        """Whether no signal has reached a site, nor one before it, so that it is at its prediction; by what a solver
        of `Site.reached` knows of the sweeps so far."""
        return site in takewhile(lambda other: not other.reached, self.sites)

    def resting(self, node: Node) -> Site | None:
        """The site of a node if it rests; None for a node that fires several times in a pass."""
        sites = self._of_node[node.name]
        return sites[0] if len(sites) == 1 and self.rests(sites[0]) else None

    @property
    def leaves(self) -> list[Tensor]:
        return [site.leaf for site in self.sites]

    def note_output(self, energy: Tensor) -> Tensor:
        """Note a pass's output energy, nats, [batch]; returned is what of it belongs to F."""
        energy = self.phase.strength * energy
        self.output_energy = energy.detach()
        if self.at_rest:
            self.feedforward_energy = self.output_energy
        return self.signed(energy)

    def signed(self, energy: Tensor) -> Tensor:
        """Values of each sequence, [batch], with the signs of its output energy; the inverse of itself."""
        return energy if self.signs is None else energy * self.signs.to(energy)

    def begin(self, mode: str, *, measures: bool = True) -> None:
        """Begin a sweep in RELAX or LEARN mode, which measures g and dF/dx; at rest any does. Its pass may be run
        again."""
        self.mode = mode
        self.scale = 1.0
        self.sweeps += 1
        self.measures = measures or self.at_rest

    def begin_pass(self) -> None:
        """Forget what an unfinished or refused run of this pass has left at the sites."""
        self._visits = {}
        self._held = {}
        for site in self.sites:
            site.signal = None

    def without_padding(self, site: Site, values: Tensor) -> Tensor:
        """`values`, shaped as the states of a site, with zeros where the batch is padding."""
        present = self.padding.at(site)
        return values if present is None else torch.where(present, values, 0)

    def hold(self, weight: Tensor, gradient: Tensor) -> None:
        """Keep a weight's gradient, in nats, until the loss's `backward()` tells its scale.

        It is handed over: nothing else may use its memory, as it is scaled there and becomes the weight's `.grad`, or
        is added to that in place, as autograd does.
        """
        self._held[weight] = self._held[weight] + gradient if weight in self._held else gradient

    def visit(self, node: Node, mu: Tensor) -> Tensor:
        """The state x = mu + e of the node that just computed `mu`; called by its hook."""
        site = self._site(node, mu)
        if node.energy.uses_prediction:
            site.prediction = wide(mu.detach())
        state = self._join(self, site, mu)
        if self.states is not None:
            self.states[site.label] = state.detach()
        if self.at_rest:
            activity = self.without_padding(site, node.energy.activity(mu.detach()))
            site.prediction_norm = site.norm(activity, self.batch)
            present = self.padding.at(site)
            site.size = mu.numel() if present is None else present.expand(mu.shape).sum()
        if self.at_rest and node.energy.zero_at_rest:
            site.energy = site.zeros
        else:
            energy = node.energy.energy(site.error.detach(), site.prediction, site.precision)
            site.energy = site.per_sequence(energy, self.batch)
        if self.at_rest:
            site.rest_energy = site.energy
        site.signal_square = site.gradient_square = site.zeros
        return state

    @property
    def at_rest(self) -> bool:
        """Whether this is the first pass, where every error is zero."""
        return self.sweeps == 1 and not self.phase.warm

    def generator(self, device: torch.device) -> torch.Generator:
        """What the errors on a device are drawn from: by the seed, and another stream on each device."""
        assert self.seed is not None
        if device not in self._generators:
            seed = self.seed + DEVICE_STRIDE * len(self._generators)
            self._generators[device] = torch.Generator(device).manual_seed(seed)
        return self._generators[device]

    def _site(self, node: Node, mu: Tensor) -> Site:
        sites = self._of_node.setdefault(node.name, [])
        visit = self._visits[node.name] = self._visits.get(node.name, -1) + 1
        if self.feedforward_energy is None and visit == len(sites):
            _check_keeps_sequences_apart(node, mu, self.batch)
            label = f"{node.name}-{visit}" if visit else node.name
            sites.append(Site(node, label, mu, self._strength, self.batch))
            self.sites.append(sites[-1])
        if not sites or visit >= len(sites) > 1:
            raise RuntimeError(
                f"node {node.name!r} ran more often than in the first pass of the same step ({len(sites)} times): the "
                "model's passes over one batch must agree, and activation checkpointing may not run again what runs "
                "several times in a pass"
            )
        site = sites[visit % len(sites)]  # activation checkpointing runs a module again in the backward pass
        if site.shape != mu.shape:
            raise RuntimeError(
                f"node {node.name!r} computed shape {tuple(mu.shape)} after {tuple(site.shape)} in the same step: "
                "the model's passes over one batch must agree"
            )
        return site

    def measure(self, site: Site, signal: Tensor, gradient: Tensor) -> None:
        """Note g and dF/dx of a site, in nats; called once per site and pass."""
        site.signal_square = self._weighted_square(site, signal)
        site.gradient_square = site.signal_square if self.at_rest else self._weighted_square(site, gradient)
        if site is self.top:
            self.top_signal.note(signal)

    def note_learned(self, site: Site, signal: Tensor) -> None:
        """Note what the module of a site learns from in a pass, in nats; that of the top node is kept."""
        if site is self.top:
            self.top_signal.note_learned(signal, self.phase.weight)

    @property
    def top(self) -> Site | None:
        """The last site that a signal has reached, which the output follows; None if it is on another process."""
        return next((site for site in reversed(self.sites) if site.reached), None) if self.share.top else None

    def _weighted_square(self, site: Site, values: Tensor) -> Tensor:
        per_token = site.node.energy.square(values, site.prediction, site.precision)
        return site.per_sequence(per_token, self.batch)

    def columns(self, values: Tensor) -> list[Tensor]:
        """For each site values of the sequences, [batch], as a column; sites of one shape share it."""
        found: dict[Any, Tensor] = {}
        columns = []
        for site in self.sites:
            like = (site.shape[0], len(site.shape), site.error.device, site.error.dtype)
            if like not in found:
                found[like] = site.column(values)
            columns.append(found[like])
        return columns

    def scale_of(self, site: Site) -> Tensor | float:
        """What g at a site is multiplied by, against nats of F, as a column: the loss's factor, and the signs of its
        sequences."""
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale.to(site.error).view([1] * len(site.shape))
        return scale if self.signs is None or self.mode == RELAX else scale * site.column(self.signs)

    def loss(self, output_energy: Tensor) -> Tensor:
        """The summed output energy, given with its signs, as a scalar to scale and call `backward()` on in LEARN mode.

        Without them: what is learned from a sequence has the sign of its output energy too.
        """

        def note(scale: Tensor) -> None:
            self.scale = scale
            while self._held:
                weight, gradient = self._held.popitem()
                gradient.mul_(scale.to(gradient))
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

        total: Tensor = LossScale.apply(self.signed(output_energy).sum(), note)  # type: ignore[no-untyped-call]
        return self.phase.weight * total

    def free_energy(self) -> Tensor:
        """F of each sequence at the last pass, nats, [batch], in `sum_dtype`."""
        assert self.output_energy is not None
        return self._with_sites(self.signed(self.output_energy), "energy")

    def rest_energy(self) -> Tensor:
        """F of each sequence where every error is zero, nats, [batch], in `sum_dtype`."""
        assert self.feedforward_energy is not None
        return self._with_sites(self.signed(self.feedforward_energy), "rest_energy")

    def _with_sites(self, values: Tensor, name: str) -> Tensor:
        """Values of each sequence, [batch], and what all sites measured under this name, wherever they are."""
        measured = [getattr(site, name) for site in self.sites]
        return self.share.sum(_together([exact(values), *measured], values.device).sum(0))

    def _squares(self) -> tuple[Tensor, Tensor]:
        """|dF/dx|^2 and |g|^2 of each sequence, over all nodes, [batch]."""
        if not self.measures:
            raise RuntimeError(
                "the last sweep measured no gradient: without a tolerance only those at rest and the last do"
            )
        assert self.output_energy is not None
        device = self.output_energy.device
        pairs = [square for site in self.sites for square in (site.gradient_square, site.signal_square)]
        squares = (
            _together(pairs, device).view(-1, 2, self.batch).sum(0) if pairs
            else torch.zeros(2, self.batch, dtype=sum_dtype(device), device=device)
        )  # fmt: skip
        gradient, signal = self.share.sum(squares).unbind()
        return gradient, signal

    def residual(self) -> Tensor:
        """|dF/de| / |g| of each sequence at the last pass, [batch]: 1 where it starts, 0 at equilibrium.

        It is 0 where no signal arrives, as for a sequence without labels; means leave such sequences out. Raises
        RuntimeError behind a sweep in the middle that had no `tolerance` to be compared with.
        """
        return residual(*self._squares())

    def sums(self) -> dict[str, Tensor]:
        """What `summary` needs, as float64 scalars that add up over batches and processes.

        Energies are those of the states, whichever way a sequence relaxed: signs would leave little of their mean.
        Raises RuntimeError where `residual` does.
        """
        return self.share.merge(on_cpu(self.measured()))

    def measured(self) -> dict[str, Tensor]:
        """What `sums` adds up, of the nodes here: scalars on the devices that measured them. Raises as `residual`."""
        assert self.output_energy is not None
        gradient, signal = self._squares()
        free_energy = self._with_sites(self.output_energy, "energy")
        sums = {
            "tokens": self.tokens,
            "sequences": (signal > 0).sum(),
            "batches": torch.tensor(1),
            "sweeps": torch.tensor(self.sweeps),
            "tried": torch.tensor(self.tried),
            "refused": self.refused,
            "residual": residual(gradient, signal).sum(),
            "change": self.top_signal.change,
            "reference": self.top_signal.reference,
            "free_energy": free_energy.sum(),
            "nonfinite": (~free_energy.isfinite()).sum(),
            f"energy/{OUTPUT_LABEL}": exact(self.output_energy.detach()).sum(),
        }
        if self.mode == LEARN and self.phase.last:  # what is learned is known once all phases are
            sums["bias"] = self.top_signal.bias()
        if self.sites:
            device = self.output_energy.device
            energies = _together([site.energy for site in self.sites], device).sum(1)
            errors = [site.norm(site.error.detach(), self.batch) for site in self.sites]
            norms = _together(errors + [site.prediction_norm for site in self.sites], device)
            squares = exact(norms).square().sum(1).view(2, -1)
            for site, energy, error, prediction in zip(self.sites, energies, *squares, strict=True):
                sums[f"energy/{site.label}"] = energy
                sums[f"error_square/{site.label}"] = error
                sums[f"prediction_square/{site.label}"] = prediction
                sums[f"size/{site.label}"] = torch.as_tensor(site.size)
        return sums


def _together(values: list[Tensor], device: torch.device) -> Tensor:
    return torch.stack([value.to(device) for value in values])


def _check_keeps_sequences_apart(node: Node, mu: Tensor, batch: int) -> None:
    """Raise ValueError if what a module computes is not [n * batch, ...], or may be [sequence, batch, features]."""
    shape = tuple(mu.shape)
    if mu.numel() == 0 or len(mu) % batch:
        raise ValueError(
            f"node {node.name!r} has an output of shape {shape}, whose first dimension is no multiple of the batch "
            f"size {batch}: only modules that keep sequences apart can be nodes"
        )
    if len(mu) != batch and mu.dim() == 3 and mu.shape[1] == batch and _may_be_time_first(node):
        raise ValueError(
            f"node {node.name!r} has an output of shape {shape} in a batch of {batch}, and holds attention without "
            "batch_first: say whether its states are [sequence, batch, features], by an attribute time_first of the "
            f"module ({type(node.module).__name__}), True or False"
        )


def _may_be_time_first(node: Node) -> bool:
    attentions = (module for module in node.module.modules() if isinstance(module, nn.MultiheadAttention))
    return node.time_first is None and any(not attention.batch_first for attention in attentions)
