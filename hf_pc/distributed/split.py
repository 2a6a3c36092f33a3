"""`SplitPCModel`: one model over several processes, each with some of its blocks, relaxed by the `state` solver.

Given the states, every block's prediction, error and gradients are its own affair: blocks of a sweep wait for nobody.
A process holds the weights, states, gradients and optimiser state of its blocks; in each sweep it sends the state of
its last block to the process above and the signal that its first block sends down to the process below, nothing else.
It computes its second block first, so that the neighbours' messages pass meanwhile. There is no backward pass over
processes, hence no pipeline bubble; only the feedforward pass that a step starts from goes through them in turn, and
processes that the first signal has not come down to yet have nothing to do.

Two designs were weighed. Cutting the model into `nn.Sequential` parts, as pipeline libraries do, needs a cut for every
architecture. Instead each process keeps the transformers model with the others' weights given up (`stage.py`), and
the forward that transformers wrote still makes the masks, the embeddings and the logits. The solver is the one of a
single process: what it learns from other processes comes as one more leaf below its first site (`Boundary`) and as a
plane above its last, whose slope is the signal from above.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_pc.architecture import evaluating, routes
from hf_pc.config import PCConfig
from hf_pc.distributed.neighbours import Neighbours, Receipt, Timeline
from hf_pc.distributed.plan import fingerprint, planned
from hf_pc.distributed.stage import Stage
from hf_pc.distributed.weights import Shared, clip_grad_norm, whole_state
from hf_pc.dtypes import wide
from hf_pc.energies import Energy
from hf_pc.hub import push
from hf_pc.model import PCModel
from hf_pc.node import LEARN, Boundary, Node
from hf_pc.output import IGNORED
from hf_pc.placement import blocks
from hf_pc.processes import by_all, gathered, same_everywhere
from hf_pc.report import RelaxationOutput
from hf_pc.reuse import FirstPrediction
from hf_pc.rng import RandomState, own_stream


class SplitPCModel(PCModel):
    """A PCModel whose blocks are spread over the processes of the default group, in order of rank.

    Every process builds it from the same model and configuration, and is given the same batches; each then holds its
    own blocks alone, and `parameters()` are those. With one process it is a PCModel. The model itself no longer runs:
    `evaluate`, or what `save_pretrained` wrote, is there to measure and generate with.

    Args:
        model: a transformers or PEFT model whose blocks are a chain (decoder-only or encoder-only).
        config: `solver="state"` (or another of its kind) and `nodes="block"`.
        split: blocks of each process; None balances what a sweep computes.
        example: inputs of one short sequence, from which it is read what runs before and after the blocks; None
            takes two tokens.

    Raises:
        ValueError: on every process, where the model or the configuration cannot be split, the processes were given
            different ones, there are more processes than blocks, or a launcher's processes have no group yet.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PCConfig | dict[str, Any] | None = None,
        *,
        split: Sequence[int] | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        config = PCConfig(solver="state") if config is None else PCConfig.of(config)
        chain, self.split = planned(model, config, split, example)
        self.neighbours = Neighbours(next(next(iter(blocks(model).values())).parameters()).device)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.stage = Stage(model, chain, self.split, self.neighbours.index, self.neighbours.timeline)
        self.shared = Shared(self.stage, trained)
        super().__init__(model, config)
        self.share = self.neighbours
        if not self.stage.first:
            self._first_prediction = FirstPrediction(model, None)
        self._calling = False
        self._entered: Tensor  # the state before the first block of all; elsewhere zeros of its shape

    @property
    def timeline(self) -> Timeline:
        """What this process did and when, while `timeline.on`."""
        return self.neighbours.timeline

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that this process holds: give these to its optimizer."""
        return (p for p in self.model.parameters() if p.device.type != "meta")

    def _visit(self, node: Node, mu: Tensor) -> Tensor | None:
        return super()._visit(node, mu) if self._calling else None  # a stand-in's output is no prediction

    def _pass(self, forward: Any, batch: Mapping[str, Any], labels: Tensor) -> tuple[Any, Tensor]:
        """One sweep of the blocks here; elsewhere than at the top the output energy is the plane seen from here."""
        assert self.relaxation is not None
        assert self._random is not None
        at_rest = self.relaxation.at_rest
        if routes(self.model, batch):
            raise ValueError("output_router_logits=True cannot be had over several processes: the router's loss "
                             "reaches into every block")  # fmt: skip
        batch = self._begin_pass(batch)
        if at_rest:
            self.stage.begin_step(self._random)
        if at_rest or (self.stage.first and self.relaxation.mode == LEARN):
            with by_all(self.neighbours.device) if at_rest else nullcontext():  # the first alone looks up inputs
                self._entered = self.stage.enter(batch)
        above = None
        self._calling = True
        try:
            if at_rest:
                self._through_all(self._entered)
            else:
                above = self._sweep()
        finally:
            self._calling = False
        top = self.relaxation.sites[-1]
        outputs, energy = {}, torch.zeros(len(labels), device=labels.device)
        with by_all(self.neighbours.device) if at_rest else nullcontext():  # the last alone looks at labels
            if self.stage.last:
                outputs = self.stage.leave(batch, top.leaf.to(self._entered.dtype, copy=True))
                energy = self.output.total(outputs, labels, checked=not at_rest)
        energy = self.relaxation.note_output(energy)
        if not self.stage.last:
            slope = torch.zeros_like(top.leaf) if above is None else above.wait()  # at rest no signal comes yet
            comes = self.relaxation.sweeps > sum(self.split[self.neighbours.index + 1 :])
            if comes or self.relaxation.mode == LEARN:
                energy = (top.leaf * slope).flatten(1).sum(1)
        return outputs, energy

    def _through_all(self, entered: Tensor) -> Tensor:
        """A feedforward pass, one process after the other: the state behind the last block here.

        Where a batch relaxes, states start at their predictions, and what comes from below is the boundary.

        Args:
            entered: the state before the first block of all; on other processes anything of its shape and dtype.
        """
        neighbours, state = self.neighbours, entered
        if not self.stage.first:
            received = neighbours.receive(neighbours.index - 1, wide(state)).wait()
            if self._calling:
                assert self.relaxation is not None
                self.relaxation.boundary = Boundary(received.requires_grad_())
            state = received.detach().to(state.dtype)
        for position in range(len(self.stage.blocks)):
            state = self.stage.call(position, state)
        if not self.stage.last:
            neighbours.send(neighbours.index + 1, wide(state.detach()))
        return state

    def _sweep(self) -> Receipt | None:
        """All blocks at the present states, the one that waits for a neighbour second; returns what comes from above.

        The first site's signal is sent down as soon as it is known, and so was the last state before anything else.
        """
        relaxation, neighbours = self.relaxation, self.neighbours
        assert relaxation is not None
        index, boundary = neighbours.index, relaxation.boundary
        above = below = None
        if not self.stage.last:
            neighbours.send(index + 1, relaxation.sites[-1].leaf)
            above = neighbours.receive(index + 1, relaxation.sites[-1].leaf)
        if boundary is not None:
            below = neighbours.receive(index - 1, boundary.leaf.detach())
        order = list(range(len(self.stage.blocks)))
        if len(order) > 1 and boundary is not None:
            order[:2] = 1, 0
        for position in order:
            if position:
                state = relaxation.sites[position - 1].leaf
            elif boundary is None:
                state = self._entered
            else:
                assert below is not None
                boundary.leaf = below.wait().requires_grad_()
                boundary.signal = None
                state = boundary.leaf
            self.stage.call(position, state.to(self._entered.dtype, copy=True))
            if not position and boundary is not None:
                signal = boundary.signal
                neighbours.send(index - 1, torch.zeros_like(boundary.leaf) if signal is None else signal)
        return above

    def _run(
        self, inputs: Mapping[str, Any], mode: str, items: Tensor | int | None,
        weight_step: Callable[[Tensor], None] | None = None,
    ) -> RelaxationOutput:  # fmt: skip
        self._check_batch(inputs, items)
        before = [(p, p.grad) for p in self.shared.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        try:
            with own_stream(self.neighbours.index, (p.device for p in self.parameters())):
                report = super()._run(inputs, mode, items, weight_step)
            self.shared.sum_gradients(self.neighbours)
        finally:
            for parameter, kept in before:
                if kept is not None:
                    parameter.grad = kept if parameter.grad is None else parameter.grad + kept
        return report

    def _check_batch(self, inputs: Mapping[str, Any], items: Tensor | int | None = None) -> None:
        """Raise ValueError everywhere if the processes were not given the same batch."""
        own = {f"{n!r} of the batch": fingerprint(v) for n, v in inputs.items() if isinstance(v, Tensor)}
        same_everywhere(own | {"num_items_in_batch": None if items is None else float(items)})

    def steer(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> None:
        """As `PCModel.steer`; called by every process, each of which then knows what the energies of all learned."""
        super().steer(reduce)
        if all(type(node.energy).state_dict is Energy.state_dict for node in self._module_nodes):
            return  # no energy here learns anything, and so none of the other processes
        own = {n.name: n.energy.state_dict() for n in self._module_nodes if n.module in self.stage.blocks}
        learned = {name: state for part in gathered(own) for name, state in part.items()}
        for node in self._module_nodes:
            if node.name not in own:
                node.energy.load_state_dict(learned[node.name])

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """Nats per label token of plain forward passes over batches, the same on every process."""
        device = self.neighbours.device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluating(self.model):
            for inputs in itertools.chain(batches, [None]):  # that all come to the end together is checked too
                self._check_batch(inputs or {})
                if inputs is None:
                    break
                batch, labels = self._split(inputs, self.phases[0])
                with by_all(device):
                    state = self.stage.enter(batch)
                self.stage.begin_step(RandomState((p.device for p in self.parameters()), self._numpy))
                state = self._through_all(state)
                with by_all(device):
                    if self.stage.last:
                        energy = self.output.total(self.stage.leave(batch, state), labels).sum()
                        totals += torch.stack([energy.double(), labels.ne(IGNORED).sum().double()]).to(totals)
        nats, tokens = self.neighbours.sum(totals).tolist()
        if not tokens:
            raise ValueError("the batches hold no label: there is nothing to evaluate")
        return float(nats / tokens)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """As `torch.nn.utils.clip_grad_norm_` over the whole model; returns its norm before."""
        return clip_grad_norm(self.stage, self.neighbours, max_norm)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the whole model from process 0, as `PCModel.save_pretrained`; called by every process."""
        self._from_first(lambda state: self._write(state, kwargs, folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the whole model from process 0, as `PCModel.push_to_hub`; called by every process, returns there."""

        def upload(state: dict[str, Tensor]) -> Any:
            return push(self.model, self.config, repo_id, partial(self._write, state, {}), **options)

        return self._from_first(upload)

    def _write(self, state: dict[str, Tensor], kwargs: dict[str, Any], folder: str | os.PathLike[str]) -> None:
        if Path(folder).is_file():
            raise FileExistsError(f"{folder} is a file: a folder is needed")
        super().save_pretrained(folder, state_dict=state, **kwargs)

    def _from_first(self, do: Callable[[dict[str, Tensor]], Any]) -> Any:
        """Let process 0 do something with the whole state_dict; where it fails every process raises."""
        state, result = whole_state(self.stage, self.neighbours), None
        with by_all(self.neighbours.device):
            if state is not None:
                result = do(state)
        return result
