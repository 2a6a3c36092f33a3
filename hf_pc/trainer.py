"""`PCTrainer`: a transformers Trainer whose steps relax, then learn from local errors.

Only what differs from backprop is here: a batch is relaxed before the Trainer's own `training_step`, whose forward
and backward pass becomes the learning pass. Accumulation, clipping, schedulers, mixed precision, callbacks,
checkpoints and gradient synchronisation stay the Trainer's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_pc.callbacks import GRADIENT, NonFiniteGuard, SteeringCallback, overflow
from hf_pc.checkpoints import CheckpointMixin
from hf_pc.checks import check_whole
from hf_pc.config import PCConfig
from hf_pc.cuda_graph import Learned
from hf_pc.diagnostics.curvature import RUNAWAY, largest_curvature
from hf_pc.heatmap import EnergyHeatmap
from hf_pc.learning import cancels_in_each_sequence, cost, phases_of
from hf_pc.measurements import add_sums, first_nonfinite, on_cpu, summary
from hf_pc.model import PCModel
from hf_pc.node import LEARN
from hf_pc.placement import resolve
from hf_pc.processes import gathered, is_sharded, naming_the_lost, reducing
from hf_pc.pushing import PushMixin
from hf_pc.readiness import check_learnable
from hf_pc.refusals import check_first_batch, check_processes, check_targets, refuse
from hf_pc.token_loss import BackpropSeq2SeqTrainer, BackpropTrainer, TokenLossMixin, argument

logger = logging.getLogger(__name__)
#: signal_bias over which phases that should cancel in each sequence no longer do
RUNAWAY_BIAS = 0.2


class NonFiniteEnergyError(RuntimeError):
    """The free energy stayed non-finite; the run stopped after saving a checkpoint."""


@dataclass
class PCTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, and what only a PC run needs.

    Args:
        nonfinite_patience: optimiser steps in a row with a non-finite free energy after which the run saves a
            checkpoint and stops. Each of these steps leaves the weights as they are.
        curvature_steps: every so many optimiser steps the largest curvature of the free energy is logged, and a
            warning given where it has run away; each time costs about 16 sweeps. None never looks.
    """

    nonfinite_patience: int = field(
        default=3, metadata={"help": "Steps in a row with a non-finite free energy before the run stops."}
    )
    curvature_steps: int | None = field(
        default=None, metadata={"help": "Log the largest curvature of the free energy every so many steps."}
    )

    def __post_init__(self) -> None:
        named: str | None = self.metric_for_best_model
        if getattr(self, "greater_is_better", None) is None and named is not None and named.endswith("perplexity"):
            self.greater_is_better = False  # transformers takes whatever is no loss for a score
        super().__post_init__()
        if self.curvature_steps is not None:
            check_whole("PCTrainingArguments", "curvature_steps", self.curvature_steps, least=1)
        check_whole("PCTrainingArguments", "nonfinite_patience", self.nonfinite_patience, least=1)


class PCTrainerMixin(PushMixin, CheckpointMixin, TokenLossMixin):
    """Predictive coding for any Trainer subclass: `class MyPCTrainer(PCTrainerMixin, MyTrainer)`.

    Args:
        given: the Trainer's own arguments, by place.
        pc_config: how to relax, a PCConfig or its dictionary; None takes the defaults.
        kwargs: the Trainer's own, by name.

    Raises:
        ValueError: the configuration does not fit the model, or the Trainer's arguments ask for something that
            predictive coding cannot do yet; raised before training starts.
    """

    def __init__(self, *given: Any, pc_config: PCConfig | dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(argument("model", 0, given, kwargs), PCModel):
            raise ValueError("model=PCModel(...) is not allowed: give its .model, and its .config as pc_config")
        self.pc_config = PCConfig.of(pc_config)
        super().__init__(*given, output=self.pc_config.output, **kwargs)
        self.pc: PCModel | None = None
        self.stopped_by: str | None = None
        self.nonfinite_node: str | None = None
        self._window: dict[str, Tensor] = {}
        self._probed: set[int] = set()
        self._warned = False
        self._restored: dict[str, Any] | None = None
        patience = getattr(self.args, "nonfinite_patience", PCTrainingArguments.nonfinite_patience)
        self.add_callback(SteeringCallback(self))
        self.add_callback(NonFiniteGuard(self, patience))
        self.add_callback(EnergyHeatmap(self))

    def _check(self, model: Any, args: TrainingArguments | None, kwargs: Mapping[str, Any]) -> None:
        super()._check(model, args, kwargs)
        if model is not None:
            check_targets(model)
            resolve(model, self.pc_config)  # complain now; hooks are attached when training starts
            if args is not None:
                check_learnable(model)
        if args is not None:
            refuse(args, self.pc_config, model)
        order = type(self).__mro__
        for cls in order[order.index(TokenLossMixin) + 1 : order.index(Trainer)] if self.pc_config.cuda_graph else ():
            if "training_step" in vars(cls):
                logger.warning(
                    "%s.training_step does not run in replays of a recorded step (PCConfig.cuda_graph=True): what it "
                    "counts or logs is left out there", cls.__name__,
                )  # fmt: skip

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Raises NonFiniteEnergyError where a non-finite free energy persisted, but in a search of
        hyperparameters, whose trial ends there."""
        if self.args.should_save:
            self.pc_config.save_pretrained(self.args.output_dir)
        # training goes on where it was, but with `model_init`, which begins anew
        learned = self._restored if self.pc is None else self.pc.state_dict()
        self._restored = learned if self.model_init is None else None
        self.stopped_by, self._window, self._probed, self.pc = None, {}, set(), None
        self._warned = False
        try:
            with naming_the_lost(str(self.args.output_dir)):
                check_processes(self.args, self.pc_config, self.train_dataset, self.eval_dataset)
                result = super().train(resume_from_checkpoint, *rest, **kwargs)
        finally:
            if self.pc is not None:
                self.pc.detach()
        if self.stopped_by is not None:
            message = (
                f"the free energy or the gradient of {self.stopped_by} is not finite, step after step; the weights "
                f"are those before it happened and a checkpoint is in {self.args.output_dir}. Lower the learning rate "
                "or the relaxed_fraction"
            )
            if self.hp_search_backend is None:
                raise NonFiniteEnergyError(message)
            logger.warning(message)  # of one trial of a search, which goes by what these weights give
        return result

    def _attached(self) -> PCModel:
        if self.pc is None:  # in the first step: models that are sharded or rebuilt are so by now
            self.pc = PCModel(self.accelerator.unwrap_model(self.model_wrapped), self.pc_config)
            check_learnable(self.pc.model)  # that of `model_init` is seen no sooner
            if self._restored is not None:
                self.pc.load_state_dict(self._restored)
                self._restored = None
        return self.pc

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.pc is None:
            check_first_batch(inputs)
        self._compare(model, inputs)  # not while a batch relaxes
        pc = self._attached()
        model.train()
        switch = getattr(self.optimizer, "train", None)
        if callable(switch):  # of averaged weights, before the states relax
            switch()
        inputs = self._prepare_inputs(inputs)
        self._probe(pc, inputs)
        weight_step = None
        if self.pc_config.weight_update == "every_sweep":
            weight_step = self._weight_step(model, inputs, num_items_in_batch)
        self.nonfinite_node = None
        before = self._without_labels
        learn = partial(self._learn, model, weight_step)
        measured, report = pc.take(learn, inputs, num_items_in_batch)
        for phase, found in zip(pc.phases, measured, strict=True):
            sums = pc.note(phase, found, len(inputs["labels"]))
            add_sums(self._window, sums)
            if sums["nonfinite"]:
                self.nonfinite_node = self.nonfinite_node or first_nonfinite(on_cpu(found))
        self._without_labels = before + report["without_labels"]
        loss: Tensor = report["loss"]
        return loss

    def _learn(
        self, model: nn.Module, weight_step: Callable[[Tensor], None] | None, inputs: Mapping[str, Any],
        items: Tensor | int | None,
    ) -> Learned:  # fmt: skip
        """Every phase of a step: what each measured, the loss to log, and whether there was nothing to learn from."""
        pc = self._attached()
        self._without_labels = 0
        measured: list[dict[str, Tensor]] = []
        logged: Tensor | None = None
        for phase in pc.phases:
            with (
                self._relaxing(model, weight_step),
                pc.relaxed(inputs, weight_step, phase, model) as relaxation,
                self._synchronised(model, phase.last),
            ):
                loss: Tensor = super().training_step(model, dict(inputs), items)
                if relaxation.mode != LEARN:
                    raise ValueError(
                        f"the training_step of {type(self).__name__} computes a loss of its own, by other passes than "
                        "that of compute_loss: what is learned here is the output energy"
                    )
                measured.append(pc.measured(relaxation))
                if logged is None:
                    # the feedforward pass's loss, not that of states which have seen the labels
                    assert relaxation.feedforward_energy is not None
                    assert relaxation.output_energy is not None
                    seen, relaxed = relaxation.feedforward_energy.sum(), relaxation.output_energy.sum()
                    scale = torch.where(relaxed == 0, 1.0, seen / relaxed / phase.weight)
                    logged = (loss - self._routing) * scale + self._routing / phase.share
        assert logged is not None
        return measured, {"loss": logged, "without_labels": self._without_labels}

    def _probe(self, pc: PCModel, inputs: Mapping[str, Any]) -> None:
        every = getattr(self.args, "curvature_steps", None)
        if every is None or self.state.global_step % every or self.state.global_step in self._probed:
            return
        self._probed.add(self.state.global_step)
        curvature = max(gathered(largest_curvature(pc, inputs)))
        self.log({"curvature": curvature})
        if curvature > RUNAWAY:
            logger.warning(
                "step %d: the free energy's largest curvature is %.3g precisions; over %g a relaxation needs ever "
                "smaller steps, and published runs collapsed. Lower relaxed_fraction, or learn balanced",
                self.state.global_step, curvature, RUNAWAY,
            )  # fmt: skip

    def floating_point_ops(self, inputs: dict[str, Tensor | Any]) -> int:
        """As `Trainer.floating_point_ops`, of all sweeps and phases: what `total_flos` adds up."""
        phases = phases_of(self.pc_config.learning, self.pc_config.strengths)
        of_backprop: int = super().floating_point_ops(inputs)
        return round(of_backprop * cost(phases, self.pc_config.sweeps))

    def _relaxing(self, model: nn.Module, weight_step: Any) -> AbstractContextManager[Any]:
        """A sharded model would take the backward pass of a relaxing sweep for one to exchange gradients after."""
        return reducing(model, False) if weight_step is None and is_sharded(model) else nullcontext()

    def _synchronised(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients once per optimiser step, after the last phase of its last batch."""
        if is_sharded(model):  # where Accelerate's no_sync would end an accumulating one around it
            return reducing(model, last and self.accelerator.sync_gradients)
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _auxiliary(self, outputs: Any) -> Tensor | float:
        loss = super()._auxiliary(outputs)
        return loss if self.pc is None or self.pc.relaxation is None else self.pc.relaxation.phase.share * loss

    def _weight_step(
        self, model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int | None
    ) -> Callable[[Tensor], None]:
        """Incremental PC (arXiv 2212.00720): a step of the weights' optimizer after each relaxing sweep."""
        divisor = max(items, 1) if items is not None else self.output.count(self.output.split(inputs)[1])
        # processes average their gradients, as in `compute_loss`
        averaged = items is not None and self.args.average_tokens_across_devices
        factor = self.accelerator.num_processes if averaged else 1

        def step(loss: Tensor) -> None:
            self.accelerator.backward(factor * loss / divisor)
            bad = torch.tensor([float(overflow(p.grad for p in model.parameters()))], dtype=torch.float64)
            if self.reduce_sums(bad).item():  # `NonFiniteGuard` then leaves out the last sweep's step, and counts it
                self.nonfinite_node = GRADIENT
                model.zero_grad()
                return
            if self.args.max_grad_norm:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            assert self.optimizer is not None
            self.optimizer.step()
            model.zero_grad()

        return step

    def _output_energy(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        if self.pc is None or self.pc.relaxation is None:
            return super()._output_energy(model, inputs)
        return self.pc.learning_pass(inputs, forward=model)

    def reduce_sums(self, total: Tensor) -> Tensor:
        """Sum a float64 tensor over processes."""
        if self.accelerator.num_processes == 1:
            return total
        reduced: Tensor = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        return reduced

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds, to each training log, the means since the last one: free energy, energy per node (nats per label
        token), residual, relaxed_fraction, signal_bias, displacement, sweeps, share of refused sweeps, relative_std.
        """
        if "loss" in logs and self._window:
            logs.update(self._means())
            self._warn_of_bias(logs["signal_bias"])
        super().log(logs, *args, **kwargs)

    def _warn_of_bias(self, bias: float) -> None:
        """Once in a run."""
        rule = self.pc_config.learning
        cancels = self.pc is not None and cancels_in_each_sequence(self.pc.phases)
        if self._warned or not cancels or not RUNAWAY_BIAS < bias < math.inf:
            return
        self._warned = True
        logger.warning(
            "step %d: signal_bias is %.2g; over %g the phases of learning=%r do not cancel, and runs go astray. "
            "Unless the residual is high, which more sweeps lower, relax less: by a bias_limit such as 0.05, or a "
            "lower relaxed_fraction or relative_std",
            self.state.global_step, bias, RUNAWAY_BIAS, rule,
        )  # fmt: skip

    def _means(self) -> dict[str, float]:
        names = list(self._window)
        totals = self.reduce_sums(torch.stack([self._window[name] for name in names]))
        self._window = {}
        facts = summary(dict(zip(names, totals.unbind(), strict=True)))
        displacement = facts.pop("displacement")
        energies = facts.pop("energies")
        means: dict[str, float] = facts
        means["displacement"] = sum(displacement.values()) / max(len(displacement), 1)
        if self.pc_config.precision is None and self.pc is not None:
            means["relative_std"] = self.pc.relative_std
        means.update({f"energy/{name}": value for name, value in energies.items()})
        return means


class PCTrainer(PCTrainerMixin, Trainer):
    """`transformers.Trainer` with `pc_config=`: see `PCTrainerMixin`."""


@dataclass
class PCSeq2SeqTrainingArguments(PCTrainingArguments, Seq2SeqTrainingArguments):
    """transformers' Seq2SeqTrainingArguments, and what only a PC run needs."""


class PCSeq2SeqTrainer(PCTrainerMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with `pc_config=`; evaluates by generation with `predict_with_generate`."""


__all__ = [
    "BackpropSeq2SeqTrainer",
    "BackpropTrainer",
    "NonFiniteEnergyError",
    "PCSeq2SeqTrainer",
    "PCSeq2SeqTrainingArguments",
    "PCTrainer",
    "PCTrainerMixin",
    "PCTrainingArguments",
]
