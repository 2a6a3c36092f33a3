"""`PCModel`: attaches PC nodes to a Hugging Face model and relaxes batches (`hf_pc.saving`: saves and loads).

The wrapper holds the model and is no nn.Module itself: class, configuration, parameters and checkpoints stay those
of transformers, and a detached or merely evaluated model computes bit for bit what it did before. (While attention
logits are nodes it computes them by eager attention, whose rounding may differ.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import (
    auxiliary_loss,
    base_model,
    layer_drop,
    plainly,
    routes,
)
from hf_pc.attachment import Attachment
from hf_pc.attention import AttentionNodes
from hf_pc.batch_state import RunningStatistics, copied, drop_nothing, without_dropout
from hf_pc.compilation import compile_parts
from hf_pc.config import PCConfig
from hf_pc.cuda_graph import Buffers, Learned, Step
from hf_pc.dtypes import exact, lowered
from hf_pc.learning import PLAIN, Phase, phases_of
from hf_pc.measurements import EVERY_PHASE, add_sums, on_cpu, summary
from hf_pc.node import LEARN, RELAX, Node, Strength
from hf_pc.output import IGNORED, Output
from hf_pc.padding import Padding, encoder_of
from hf_pc.placement import innermost, resolve
from hf_pc.processes import changes_buffers, everywhere, is_sharded, process_count, process_index
from hf_pc.readiness import check_float32, check_idle, check_learnable, check_mode, check_reached, check_weight_hooks
from hf_pc.recorder import Recorder
from hf_pc.relaxation import Relaxation, Share
from hf_pc.report import RelaxationOutput
from hf_pc.reuse import FirstPrediction, RunsAgain, unreached_left_out
from hf_pc.rng import NothingDrawn, RandomState, draws_from_numpy, undrawn
from hf_pc.saving import SavingMixin
from hf_pc.solvers import SOLVERS
from hf_pc.steering import Steering


class PCModel(SavingMixin):
    """A Hugging Face model whose blocks are PC nodes.

    Args:
        model: any transformers or PEFT model; modified only by forward hooks, which `detach` removes.
        config: what to attach and how to relax, a PCConfig or its dictionary; None takes the defaults.

    Raises:
        ValueError: the configuration does not fit the model, or the model has nodes already.
    """

    def __init__(self, model: nn.Module, config: PCConfig | dict[str, Any] | None = None) -> None:
        self.model = model
        self.config = PCConfig.of(config)
        check_float32(model, self.config)
        self._module_nodes = resolve(model, self.config)
        name = self.config.attention_energy
        self._attention = None if name is None else AttentionNodes(model, name)
        self.output = Output.of(model, self.config.output)
        self._encoder = encoder_of(model)
        self.solver = SOLVERS[self.config.solver](self.config)
        self.steering = Steering(self.config)
        lower = self.config.relaxation_dtype
        #: what sweeps between the first and the last are computed in; None: in what is learned in
        self._lower: torch.dtype | None = None if lower is None else getattr(torch, lower)
        #: the relaxations of one step; the first is the one that is reported
        self.phases: tuple[Phase, ...] = phases_of(self.config.learning, self.config.strengths)
        self.share = Share()
        self.relaxation: Relaxation | None = None
        self._before: Relaxation | None = None
        self._first_prediction = FirstPrediction(model, None if self._attention else innermost(self._module_nodes))
        self._statistics = RunningStatistics(model)
        self._numpy = draws_from_numpy(model)
        self._own_labels: Tensor | None = None
        self._random: RandomState | None = None
        self._parameters: list[nn.Parameter] = []  # of the model, as a step found them; to list them takes long
        self._devices: set[torch.device] = set()  # those of weights and batch: what is sharded may lie elsewhere
        self._confirm: Callable[[], bool] | None = None
        self._defers = self._sharded = self._counts = False
        self._freezes = False  # whether no weight requires grad at present
        self._recorder: Recorder | None = None
        self._buffers: Buffers | None = None  # of a step that is being recorded
        self.attach()

    @property
    def nodes(self) -> list[Node]:
        """Every node; those on attention logits are known once a batch has passed."""
        return [*self._module_nodes, *(self._attention.nodes.values() if self._attention else [])]

    def attach(self) -> None:
        """Put the nodes onto the model. Raises ValueError if some PCModel is attached to it already."""
        this = weakref.ref(self)

        def active() -> bool:
            return (alive := this()) is not None and alive.relaxation is not None

        def frozen() -> bool:
            return (alive := this()) is not None and alive._freezes

        parts = (self._module_nodes, self.output, active, frozen)
        compiles = partial(compile_parts, *parts) if self.config.compile else None
        self._attachment = Attachment(self.model, self._module_nodes, self._attention, self._visit, compiles)
        self._recorder = Recorder() if self.config.cuda_graph else None

    def detach(self) -> None:
        """Remove the nodes; the model is what it was. Does nothing if they are gone already."""
        if self.relaxation is not None:
            raise RuntimeError("this PCModel is relaxing a batch: detach() it afterwards")
        self._attachment.remove()
        self._recorder = None  # and with it the memory of recorded steps

    def _visit(self, node: Node, mu: Tensor) -> Tensor | None:
        if self.relaxation is None or not self.relaxation.sweeps:  # a pass of somebody else
            return None
        return self.relaxation.visit(node, mu)

    def _begin_pass(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What every pass of a step begins with; returns the inputs for it to take."""
        assert self._random is not None
        assert self.relaxation is not None
        self._random.restore()
        self.relaxation.begin_pass()
        self._first_prediction.begin_pass()
        self._statistics.hold(not (self._counts and self.relaxation.at_rest))
        if self.config.dropout == "off":  # again in every pass: a Trainer calls train() in between
            drop_nothing(self.model)
        return copied(batch)

    def _pass(self, forward: Callable[..., Any], batch: Mapping[str, Any], labels: Tensor) -> tuple[Any, Tensor]:
        """One forward pass at the current errors: the model's output and the output energy, nats, [batch].

        Where it raises, or its energy shows, that it cannot be differentiated as the solver meant to, the solver
        changes its ways and the pass is run again.
        """
        relaxation = self.relaxation
        assert relaxation is not None

        def run() -> Any:
            return forward(**self._begin_pass(batch))

        try:
            outputs = run()
        except RuntimeError as error:
            if not self.solver.recover(relaxation, error):
                raise
            outputs = run()
        if self._attention:
            self._attention.check()
        if relaxation.sites:
            first = relaxation.sites[0].node
            self._first_prediction.found(first.module if first in self._module_nodes else None)
        elif not (self.model.training and layer_drop(self.model)):  # which may leave a step without any block
            names = ", ".join(repr(node.name) for node in self._module_nodes)
            raise ValueError(f"none of the nodes ran in a pass over {type(self.model).__name__}: {names}")
        if relaxation.at_rest and not relaxation.phase.own_labels and any(p.own_labels for p in self.phases):
            self._own_labels = self._drawn(outputs["logits"].detach(), labels)
        checked = self._buffers is not None or not relaxation.at_rest
        energy = self.output.total(outputs, labels, checked=checked)
        if self.solver.takes_again(relaxation, energy):
            outputs = run()
            energy = self.output.total(outputs, labels, checked=True)
        return outputs, relaxation.note_output(energy)

    def _drawn(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels of the model's own, shaped as `labels`; what is drawn for them counts for nothing behind it."""
        assert self.relaxation is not None
        assert self.relaxation.seed is not None
        with undrawn(self._devices):
            torch.manual_seed(self.relaxation.seed)
            return self.output.draw(logits, labels)

    @contextmanager
    def relaxed(
        self,
        inputs: Mapping[str, Any],
        weight_step: Callable[[Tensor], None] | None = None,
        phase: Phase = PLAIN,
        forward: Callable[..., Any] | None = None,
        learns: bool = True,
    ) -> Iterator[Relaxation]:
        """Relax the errors to a batch; inside the context, `learning_pass` is the last sweep.

        Weights do not require grad while the errors relax, so nothing is computed or kept for them. However the
        context is left, the model evaluates as before and its parameters require grad as before.

        Args:
            inputs: what the model's forward takes, with labels.
            weight_step: with `weight_update="every_sweep"`, what to do with each sweep's loss: `backward()` and a
                step of the weights' optimizer.
            phase: one of `phases`, which are to be gone through in order.
            forward: what passes that move weights call instead of the model, such as its distributed wrapper.
            learns: whether weights learn from a pass inside; if not, nothing is kept for that.
        """
        self._check_ready(weight_step is not None)
        if phase.first:
            self._before = None
            self._first_prediction.forget()
            self._parameters = list(self.model.parameters())
            given = [value for value in inputs.values() if isinstance(value, Tensor)]
            self._devices = {tensor.device for tensor in (*self._parameters, *given)}
            if learns:
                check_weight_hooks(self._parameters, self.config, self.phases)
        batch, labels = self._split(inputs, phase)
        routed = routes(self.model, batch)  # a router's losses are gathered inside the blocks
        if routed and weight_step is not None:
            raise ValueError(
                "weight_update='every_sweep' is not allowed with output_router_logits=True: only the last of a step's "
                "weight updates would follow the router's loss"
            )
        spoils = changes_buffers(forward)
        forward = self.model if weight_step is None or forward is None else forward
        self._counts = learns and phase.first
        over = True  # also where an exception ends the step
        try:
            self._sharded = is_sharded(self.model)
            together = self._sharded or (weight_step is not None and process_count() > 1)
            self.relaxation = self._begin(batch, labels, phase, together)
            # a sharded model gathers a block for one backward pass through it, which pieces would not be
            self.relaxation.pieces = not self._sharded and forward is self.model
            # what waits at a site is taken up by the last phase, if that has the same sites
            later = not phase.last and all(other.warm for other in self.phases[1:])
            self._defers = later and not routed
            if phase.first:  # the phases of a step see the same dropout masks
                recorded = self._buffers is not None
                self._random = NothingDrawn() if recorded else RandomState(self._devices, self._numpy)
            with without_dropout(self.model) if self.config.dropout == "off" else nullcontext():
                # whether the module of the first node learns through what the first pass has of it
                keeps = learns and phase.first and not together and not routed and self.solver.one_backward
                keeps = keeps and not spoils and self._first_prediction.may_learn()
                reuses = weight_step is None and not routed
                self._confirm = self._relax(batch, labels, weight_step, forward, keeps=keeps, reuses=reuses)
                yield self.relaxation
            over = phase.last
        finally:
            self._statistics.hold(False)
            self._before = None if over else self.relaxation
            self._parameters = [] if over else self._parameters
            self.relaxation = self._confirm = None
            if over:
                self._random = None
                self._first_prediction.forget()

    def _check_ready(self, steps_weights: bool) -> None:
        """Raise ValueError or RuntimeError if no batch can be relaxed now, or not so."""
        check_mode(self.config, steps_weights)
        check_idle(self._attachment.alive, self.relaxation is not None)

    def _begin(self, batch: Mapping[str, Any], labels: Tensor, phase: Phase, together: bool) -> Relaxation:
        """The relaxation of a phase; `together` where every pass is a meeting of all processes."""
        held = self._buffers
        signs = None
        if phase.mirrored:
            signs = self.steering.signs(len(labels), labels.device) if held is None else held.signs
        count, strength = labels.ne(IGNORED).sum(), self.strength()
        relaxation = Relaxation(len(labels), count, strength, self.solver.join, phase, self._before, signs, self.share)
        if held is not None:
            relaxation.decide = held.decide
        relaxation.padding = Padding.of(self.model, batch, labels, self._encoder)
        if together:
            device = max(self._devices, key=lambda device: device.type not in ("cpu", "meta"))
            relaxation.agree = lambda holds: everywhere(holds, device)
        relaxation.lower = self._lower
        relaxation.weights = [p for p in self._parameters if p.requires_grad]
        if phase.first and (self.solver.draws or any(other.own_labels for other in self.phases)):
            # before the generator is noted: what is restored in every pass would give every step the same draw
            relaxation.seed = int(torch.randint(2**62, ())) + process_index()
        return relaxation

    def _relax(
        self,
        batch: Mapping[str, Any],
        labels: Tensor,
        weight_step: Callable[[Tensor], None] | None,
        forward: Callable[..., Any],
        *,
        keeps: bool,
        reuses: bool,
    ) -> Callable[[], bool]:
        """Every sweep but the last; returns the solver's answer, asked after that one, whether its errors stand.

        Args:
            keeps: the graph of the first pass is kept up to the first node, whose module learns through it.
            reuses: what no move of the states changes is not computed again.
        """
        relaxation, random = self.relaxation, self._random
        assert relaxation is not None
        assert random is not None

        def sweep() -> Tensor:
            with lowered(self._devices, None if relaxation.at_rest else self._lower):
                try:
                    energy = self._pass(forward, batch, labels)[1]
                except RunsAgain:
                    freeze()
                    energy = self._pass(forward, batch, labels)[1]
            freeze()
            if not relaxation.sites:
                raise _NothingToRelax
            return energy

        with ExitStack() as relaxing:
            freezing = self._frozen() if weight_step is None else nullcontext()
            freeze = cache(lambda: relaxing.enter_context(freezing))  # once, however often it is called
            if not keeps:
                freeze()
            if reuses:
                computed = freeze if keeps else None
                relaxing.enter_context(self._first_prediction.reused(random, computed=computed))
                if self.solver.by_node:
                    relaxing.enter_context(unreached_left_out(self._module_nodes, relaxation, random))
            try:
                return self.solver.relax(relaxation, sweep, weight_step)
            except _NothingToRelax:
                return lambda: True

    def learning_pass(
        self, inputs: Mapping[str, Any], forward: Callable[..., Any] | None = None, mode: str = LEARN
    ) -> tuple[Tensor, Any]:
        """The last sweep's forward pass: the summed output energy, nats, to divide and call `backward()` on.

        In RELAX mode it is the output energy of each sequence, [batch], for the solver's `gradients`.

        A refused pass is run again on the model itself: a wrapper that waits for gradients has been called, finds
        them whichever graph they come from, and other processes need not know. A sharded model's passes are all
        processes' own, so there all repeat it or none.

        Args:
            inputs: the batch that `relaxed` was given.
            forward: what to call instead of the model, such as its distributed wrapper.
            mode: LEARN, or RELAX to measure alone.

        Raises:
            RuntimeError: it is called outside `relaxed`.
            ValueError: no sweep has brought a signal to any node.
        """
        if self.relaxation is None or self._confirm is None:
            raise RuntimeError("learning_pass belongs inside `with pc.relaxed(inputs)`")
        check_reached(self.model, self.relaxation)
        batch, labels = self._split(inputs, self.relaxation.phase)
        forward = forward or self.model
        bare = forward is self.model
        self.relaxation.pieces = bare and not self._sharded and not routes(self.model, batch)
        first = self._first_prediction
        self.relaxation.defers = mode == LEARN and self._defers and first.serves_learning()
        learns = mode == LEARN and self.relaxation.phase.last and first.learns()
        assert self._random is not None
        reuses = self.relaxation.defers or learns
        with first.reused(self._random, graph=learns) if reuses else nullcontext():
            self.relaxation.begin(mode)
            outputs, energy = self._pass(forward, batch, labels)
            stands = self._confirm()
            if not (self.relaxation.agree(stands) if self._sharded else stands):
                del outputs, energy
                self.relaxation.begin(mode)
                outputs, energy = self._pass(self.model, batch, labels)
        if learns:
            first.spend()
        if self._recorder is not None and self.relaxation.phase.first:
            self._recorder.note(self.relaxation.sites, outputs["logits"])
        return energy if mode == RELAX else self.relaxation.loss(energy), outputs

    def free_energy_gradients(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """One more relaxing sweep: dF/dx of every site at its present leaf, nats, each shaped as the site's states.

        Raises:
            RuntimeError: it is called outside `relaxed`.
        """
        if self.relaxation is None:
            raise RuntimeError("free_energy_gradients belongs inside `with pc.relaxed(inputs)`")
        batch, labels = self._split(inputs, self.relaxation.phase)
        self.relaxation.begin(RELAX)
        for site in self.relaxation.sites:
            site.reached = True  # whoever asks may have moved any of them
        with self._frozen():
            return self.solver.gradients(self.relaxation, self._pass(self.model, batch, labels)[1])

    def backprop_loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a plain forward pass, nats per label token, a scalar: what backprop would descend.

        Raises:
            ValueError: there are no labels, or all are ignored.
        """
        batch, labels = self._split(inputs, PLAIN)
        outputs = self.model(**batch)
        return self.output.total(outputs, labels).sum() / self.output.count(labels) + auxiliary_loss(
            self.model, outputs
        )

    def _split(self, inputs: Mapping[str, Any], phase: Phase) -> tuple[dict[str, Any], Tensor]:
        batch, labels = self.output.split(inputs)
        self.output.tell(getattr(base_model(self.model), "config", None), labels)
        if phase.own_labels:
            assert self._own_labels is not None
            labels = self._own_labels
        return plainly(self.model, batch), labels

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # a gathered parameter keeps what its shard required when it was first gathered; autograd.grad leaves it alone
        trained = [] if self._sharded else [p for p in self._parameters if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            self._freezes = not self._sharded
            yield
        finally:
            self._freezes = False
            for parameter in trained:
                parameter.requires_grad_(True)

    def relax(self, **inputs: Any) -> RelaxationOutput:
        """Relax to a batch and report where the states are; weights and gradients stay untouched.

        Args:
            inputs: what the model's forward takes, with labels ([batch, sequence], -100 ignored).

        Raises:
            ValueError: there are no labels, or all are ignored.
            RuntimeError: this PCModel is detached, or relaxing a batch already.
        """
        return self._run(inputs, RELAX, None)

    def accumulate_grad(
        self,
        *,
        num_items_in_batch: Tensor | int | None = None,
        weight_step: Callable[[Tensor], None] | None = None,
        **inputs: Any,
    ) -> RelaxationOutput:
        """Relax to a batch, then add every weight's local gradient to its `.grad`.

        Args:
            num_items_in_batch: label tokens that the gradient is a mean over; None counts this batch's. Give the
                total where several batches make one optimiser step.
            weight_step: with `weight_update="every_sweep"`, what to do with the loss of each sweep but the last, nats
                per label token: `backward()`, a step of the optimizer and `zero_grad()`.
            inputs: what the model's forward takes, with labels.

        Raises:
            ValueError: there are no labels, all are ignored, or num_items_in_batch is not above 0; of this model or
                batch no step can be recorded, where `cuda_graph` asks for it.
            RuntimeError: this PCModel is detached, or relaxing a batch already.
        """
        return self._run(inputs, LEARN, num_items_in_batch, weight_step)

    def _run(
        self, inputs: Mapping[str, Any], mode: str, items: Tensor | int | None,
        weight_step: Callable[[Tensor], None] | None = None,
    ) -> RelaxationOutput:  # fmt: skip
        self.output.count(self.output.split(inputs)[1])
        if items is not None and items <= 0:
            raise ValueError(f"num_items_in_batch={items!r} is not allowed: a number above 0 is needed")
        phases = self.phases if mode == LEARN else (PLAIN,)
        if mode == LEARN and self.share.count == 1:  # of several parts one may have nothing to learn
            check_learnable(self.model)
        with torch.enable_grad():
            step = partial(self._phases, mode, weight_step)
            measured, report = self.take(step, inputs, items) if mode == LEARN else step(inputs, items)
        sums: dict[str, Tensor] = {}
        batch = len(inputs["labels"])
        for phase, found in zip(phases, measured, strict=True):
            add_sums(sums, self.note(phase, found, batch) if mode == LEARN else self.share.merge(on_cpu(found)))
        facts = {"sweeps": int(sums["sweeps"]), "feedforward_energy": float(report["feedforward_energy"])}
        return RelaxationOutput(**(report | summary(sums) | facts))

    def _phases(
        self, mode: str, weight_step: Callable[[Tensor], None] | None, inputs: Mapping[str, Any],
        items: Tensor | int | None,
    ) -> Learned:  # fmt: skip
        """Every phase of a step: what each measured, and tensors to report of the first."""

        def step(loss: Tensor) -> None:
            assert weight_step is not None
            assert self.relaxation is not None
            weight_step(loss / (self.relaxation.tokens.to(loss.device) if items is None else items))

        measured: list[dict[str, Tensor]] = []
        report: dict[str, Any] = {}
        for phase in self.phases if mode == LEARN else (PLAIN,):
            weights = None if weight_step is None else step
            with self.relaxed(inputs, weights, phase, learns=mode == LEARN) as relaxation:
                if phase.first and (mode == RELAX or self._recorder is None):  # which is reported
                    relaxation.states = {}
                if mode == LEARN:
                    self._learn(relaxation, inputs, items)
                    measured.append(self.measured(relaxation))
                else:
                    with self._frozen():
                        energy, _ = self.learning_pass(inputs, mode=RELAX)
                        self.solver.gradients(relaxation, energy)
                    measured.append(relaxation.measured())
                report = report or self._report(relaxation)
        return measured, report

    def _learn(self, relaxation: Relaxation, inputs: Mapping[str, Any], items: Tensor | int | None) -> None:
        """The last sweep of a phase: adds its part of every weight's gradient, nats per label token, to `.grad`."""
        loss, outputs = self.learning_pass(inputs)
        tokens = relaxation.tokens.to(loss.device)  # blocks may be spread over devices
        divisor = tokens if items is None else torch.as_tensor(items, device=loss.device)
        share = relaxation.phase.share * tokens / divisor
        loss = loss / divisor + share * auxiliary_loss(self.model, outputs)
        del outputs  # the logits need not be there while weights learn
        torch.autograd.backward(loss)

    def _report(self, relaxation: Relaxation) -> dict[str, Any]:
        assert relaxation.feedforward_energy is not None
        kept = relaxation.states is not None
        return {
            "feedforward_energy": self.share.sum(exact(relaxation.feedforward_energy).sum())
            / relaxation.tokens.to(relaxation.feedforward_energy.device),
            "states": relaxation.states or {},
            "errors": {site.label: site.error.detach().contiguous() for site in relaxation.sites if kept},
            "sequence_free_energy": relaxation.free_energy(),
        }

    def observe(self, relaxation: Relaxation) -> dict[str, Tensor]:
        """Note a learned phase for `steer`, and return its measurements as sums."""
        return self.note(relaxation.phase, self.measured(relaxation), relaxation.batch)

    def measured(self, relaxation: Relaxation) -> dict[str, Tensor]:
        """What a learned phase has measured, scalars on the devices that measured them; give it to `note`."""
        self.solver.close(relaxation)
        return relaxation.measured()

    def note(self, phase: Phase, measured: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
        """Note what a learned phase over `batch` sequences measured, for `steer`; returned are the sums over all nodes
        of all processes, float64 on the CPU."""
        sums = self.share.merge(on_cpu(measured))
        if phase.mirrored and phase.last:
            self.steering.count_rows(batch)
        if not phase.first:
            counted = EVERY_PHASE if not phase.feedforward else ("sweeps", "bias", "nonfinite")
            sums = {name: sums[name] for name in counted if name in sums}
        self.steering.observe(sums)
        return sums

    def steer(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> None:
        """Hold `relaxed_fraction` at its target, and let energies learn; call once per optimiser step.

        Args:
            reduce: sums a tensor over processes.
        """
        for node in self.nodes:
            node.energy.step(reduce)
        self.steering.step(reduce, steers=any(node.precision is None for node in self.nodes))

    def take(self, step: Step, inputs: Mapping[str, Any], items: Tensor | int | None) -> Learned:
        """Take a step, given as what goes through all `phases`, by way of a recording where `cuda_graph` wants one."""
        if self._recorder is None:
            return step(inputs, items)
        self._check_ready(steps_weights=False)  # which a replay would not
        return self._recorder.step(self, step, inputs, items)

    @contextmanager
    def recorded(self, buffers: Buffers) -> Iterator[None]:
        """Inside, a step reads what changes from step to step from buffers, and decides nothing by what it finds."""
        self._buffers = buffers
        try:
            yield
        finally:
            self._buffers = None

    def strength(self) -> Strength:
        """How strongly errors are penalised now."""
        held = {} if self._buffers is None else self._buffers.precisions
        return Strength(self.config.precision, self.relative_std, self.steering.activity, held)

    @property
    def relative_std(self) -> float:
        """What steering holds now: sigma as a multiple of each node's activity."""
        return self.steering.relative_std


class _NothingToRelax(Exception):  # noqa: N818
    """A model has dropped all its blocks in this step: there is one pass, which learns from the output alone."""
