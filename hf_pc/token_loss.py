"""The loss of a Trainer per label token: what backprop descends here, and what PC's learning pass starts from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import default_compute_objective

from hf_pc.architecture import auxiliary_loss, plainly
from hf_pc.callbacks import PCProgressCallback
from hf_pc.dtypes import exact
from hf_pc.output import IGNORED, Output
from hf_pc.own_loss import NO_LABELS, OTHER_LOSS, OTHER_TASK, Comparison, compare_with_own_loss
from hf_pc.processes import gathered
from hf_pc.provenance import Secret

logger = logging.getLogger(__name__)
_TrainerPart: Any = Trainer if TYPE_CHECKING else object


def argument(name: str, place: int, given: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a Trainer was given by name, or else by place; None if neither."""
    return kwargs.get(name, given[place] if len(given) > place else None)


class TokenLossMixin(_TrainerPart):
    """Loss per label token, right under accumulation, unequal label counts and in evaluation; for any Trainer.

    Training loss is the sum over label tokens divided once by the tokens of the whole optimiser step; `eval_loss` is
    a mean over all label tokens, and `eval_perplexity` its exponential. Both come from plain forward passes.

    Args:
        output: the output energy: "categorical", "gaussian", "bernoulli", or "auto" for the model's own.
    """

    output: Output
    loss_is_scaled_for_ga = True

    def __init__(self, *given: Any, output: str = "auto", **kwargs: Any) -> None:
        model, args = argument("model", 0, given, kwargs), argument("args", 1, given, kwargs)
        known = model if isinstance(model, nn.Module) and kwargs.get("peft_config") is None else None
        known_args = args if isinstance(args, TrainingArguments) else None
        self._check(known, known_args, kwargs)  # before the Trainer makes its output folder
        super().__init__(*given, **kwargs)  # by place or by name, as other Trainers may take something else first
        # what only the Trainer knew, such as the first of `model_init`, or the adapter that it put on the model
        if self.model is not known or known_args is None or len(given) > 2:
            self._check(self.model, self.args, {"compute_loss_func": self.compute_loss_func})
        if self.args.hub_token is not None:
            self.args.hub_token = Secret(self.args.hub_token)
        self.output = Output.of(self.model, output)
        self.model_accepts_loss_kwargs = True  # ask the Trainer to count label tokens, whatever the model's class
        self._loss_shifts_labels = self.output.shifted and not self.output.virtual  # there the first is a target too
        self._evaluated: list[Tensor] = []
        self._perplexity = False  # whether exp(nats per label) is one, of the labels that were evaluated
        self._without_labels: Tensor | int = 0  # batches of steps without any, since the last log
        self._warned_of_no_labels = False
        self._compared = output != "auto"  # one that is named need not be the model's own
        self._routing: Tensor | float = 0.0  # of the last loss the router's part
        self._nats = self._tokens = 0.0
        self._added: set[str] = set()  # metrics of evaluations that are ours, not those of `compute_metrics`
        bars = [callback for callback in self.callback_handler.callbacks if type(callback) is ProgressCallback]
        if bars:  # the last is the Trainer's; those of users stay
            self.remove_callback(bars[-1])
            self.add_callback(PCProgressCallback)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(TokenLossMixin) > order.index(Trainer):
            raise TypeError(f"class {cls.__name__}: name PCTrainerMixin before the Trainer, or it changes nothing")

    def _check(self, model: Any, args: TrainingArguments | None, kwargs: Mapping[str, Any]) -> None:
        """Raise ValueError on what the output energy cannot do."""
        for cls in type(self).__mro__:
            own = vars(cls).get("compute_loss")
            if own is TokenLossMixin.compute_loss and cls is not TokenLossMixin:
                break  # said in the class itself: whatever its bases compute, this is the loss
            if own is not None and cls not in (TokenLossMixin, Trainer):
                raise ValueError(
                    f"{cls.__name__}.compute_loss is not supported: the loss is the output energy, computed from the "
                    "logits and the labels. If that is the loss you mean, say so in your class: "
                    "compute_loss = PCTrainerMixin.compute_loss"
                )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is not supported: the output energy is computed from the logits")
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} is not supported: the output energy is the "
                "cross-entropy of the labels; use 0"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._without_labels, self._warned_of_no_labels = 0, False
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any) -> Tensor:
        self._compare(model, inputs)
        loss: Tensor = super().training_step(model, inputs, *rest, **kwargs)
        return loss

    def _compare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Before the first step: whether what is learned is what the model's own loss is of."""
        if self._compared:
            return
        own = compare_with_own_loss(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs), self.output)
        found: list[Comparison] = gathered(own)  # so that all processes go on, or end, together
        for said in found:
            if said.verdict == OTHER_TASK:
                raise ValueError(said.text)
        self._compared = any(said.verdict != NO_LABELS for said in found)
        different = [said.text for said in found if said.verdict == OTHER_LOSS]
        if different and self.is_world_process_zero():
            logger.warning(different[0])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The output energy, nats per label token of the optimiser step (of the batch, in evaluation)."""
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}  # which Liger's loss does
        labels = self.output.split(inputs)[1]
        learning = model.training
        energy, outputs = self._output_energy(model, inputs)
        if not learning:  # [batch]; a learning pass hands over its sum
            tokens = labels.ne(IGNORED).flatten(1).sum(1) if labels.dim() > 1 else labels.ne(IGNORED).long()
            self._evaluated = [exact(energy.detach()), exact(tokens.to(energy.device))]
            self._perplexity = self.output.perplexity_of(labels)
        items = num_items_in_batch if num_items_in_batch is not None else labels.ne(IGNORED).sum()
        # a model over several devices ends on another than it begins
        items = torch.as_tensor(items, device=energy.device)
        if learning:
            self._without_labels = self._without_labels + (items == 0)
        items = items.clamp_min(1)
        # a router's loss is a mean over its batch: it counts for the share of the step's tokens that the batch has
        share = labels.ne(IGNORED).sum().to(energy.device) / items
        routing = share * self._auxiliary(outputs)
        loss = energy.sum() / items + routing
        counted = num_items_in_batch is not None  # over all processes, then
        if counted and self.args.average_tokens_across_devices:
            loss, routing = loss * self.accelerator.num_processes, routing * self.accelerator.num_processes
        self._routing = routing.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`; says once in a run that steps had nothing to learn from."""
        told = "loss" in logs or "train_loss" in logs
        if told and not self._warned_of_no_labels and self._without_labels:
            self._warned_of_no_labels = True
            logger.warning(
                "step %d: since the last log there were steps in which every label is ignored (%d): no gradient comes "
                "from such a step. No more is said of others", self.state.global_step, IGNORED,
            )  # fmt: skip
        super().log(logs, *args, **kwargs)

    def _auxiliary(self, outputs: Any) -> Tensor | float:
        return auxiliary_loss(self.model, outputs)

    def _output_energy(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        batch, labels = self.output.split(inputs)
        outputs = model(**plainly(self.accelerator.unwrap_model(model), batch))
        return self.output.total(outputs, labels), outputs

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = []
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if not self._evaluated and inputs.get("labels") is not None:  # Seq2SeqTrainer generates, and asks for no loss
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_loss(model, self._prepare_inputs(inputs))
        if self._evaluated:
            nats, tokens = self.accelerator.gather_for_metrics(tuple(self._evaluated))
            if self.args.logging_nan_inf_filter:  # which leaves out what is no number, here by sequences
                nats, tokens = nats[nats.isfinite()], tokens[nats.isfinite()]
            self._nats, self._tokens = self._nats + float(nats.sum()), self._tokens + float(tokens.sum())
        return result

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        self._nats = self._tokens = 0.0
        prefix = metric_key_prefix
        result = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
        if self._tokens:
            loss = self._nats / self._tokens
            result.metrics[f"{prefix}_loss"] = loss
            if self._perplexity:
                name = f"{prefix}_perplexity"
                if name not in result.metrics:
                    result.metrics[name] = math.exp(min(loss, 700.0))
                    self._added.add(name)
        return result

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.hyperparameter_search`; by default the objective is eval_loss, or the sum of `compute_metrics`,
        to which the perplexity does not belong."""
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _objective(self, metrics: dict[str, float]) -> float:
        # a time that `default_compute_objective` takes for a metric
        own = {n: v for n, v in metrics.items() if n not in self._added and not n.endswith("_preparation_time")}
        objective: float = default_compute_objective(own)
        return objective


class BackpropTrainer(TokenLossMixin, Trainer):
    """The baseline: a stock Trainer with the same loss and the same evaluation as PCTrainer."""


class BackpropSeq2SeqTrainer(TokenLossMixin, Seq2SeqTrainer):
    """The baseline of PCSeq2SeqTrainer."""
