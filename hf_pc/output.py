"""The output node: the energy of the labels, per sequence, from a model's logits.

transformers' own losses are means whose denominator depends on the class (several classes ignore
`num_items_in_batch`, gpt2's evaluation counts a position that is no target). Here the sum over label tokens is
computed once and the caller divides it once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForQuestionAnsweringLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_pc.architecture import base_model, is_encoder_decoder, virtual_tokens
from hf_pc.registry import Registry

IGNORED = -100
#: causal by name, and yet their own forward compares the logits with the labels as they are
UNSHIFTED = frozenset((
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM", "PLBartForCausalLM",
    "PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
))  # fmt: skip

#: transformers' losses that are sums over labels
SUMS = (ForCausalLMLoss, ForMaskedLMLoss, ForQuestionAnsweringLoss, ForSequenceClassificationLoss,
        ForTokenClassification)  # fmt: skip
#: the outputs of what transformers calls a `problem_type`, where it is not the categorical one
PROBLEMS = {"regression": "gaussian", "multi_label_classification": "bernoulli"}


@dataclass(frozen=True)
class Output(ABC):
    """The energy of the output node, -log p(labels | logits): what a model predicts against the data.

    Args:
        shifted: logits at position i predict the label at i + 1, as in causal language models.
        keep_labels: labels stay among the model's inputs: encoder-decoders build the decoder's input from them, and
            forwards of users' own may have no default for them.
        virtual: positions that PEFT's prompt tuning puts before each sequence, which have no labels.
        chosen: the kind of output was found from the model's class, whose own loss of numbers ignores none.
    """

    shifted: bool = False
    keep_labels: bool = False
    virtual: int = 0
    chosen: bool = field(default=False, compare=False)
    #: whether exp(nats per label) is a perplexity
    has_perplexity: ClassVar[bool] = False
    #: whether `convert` looks at the labels, which waits for a GPU
    looks: ClassVar[bool] = False

    @classmethod
    def of(cls, model: nn.Module, name: str = "auto") -> Output:
        """The output energy of a model: the one named, or with "auto" what its own loss does with labels.

        Whether that shifts them is read off the class, unless the model has an attribute `shifts_labels`.
        """
        base = base_model(model)
        config = getattr(base, "config", None)
        kinds = {kind.__name__ for kind in type(base).__mro__}  # sharding, and users, derive classes of their own
        encoder_decoder = is_encoder_decoder(model)
        loss = LOSS_MAPPING.get(getattr(base, "loss_type", None) or "")
        named = loss is None and not kinds.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        causal = kinds.isdisjoint(UNSHIFTED) and (named or loss is ForCausalLMLoss)
        chosen = name == "auto"
        if chosen:
            problem = getattr(config, "problem_type", None)
            if problem is None and getattr(config, "num_labels", 2) == 1 and any("Classification" in k for k in kinds):
                problem = "regression"
            name = PROBLEMS.get(str(problem), "categorical")
        if chosen and loss is not None and loss not in SUMS:
            raise ValueError(
                f"{type(base).__name__} learns by {loss.__name__}, which is no sum over labels of what the logits say "
                "of each: no output energy stands for it (where one does, name it as PCConfig.output)"
            )
        told = getattr(model, "shifts_labels", getattr(base, "shifts_labels", None))
        shifted = causal and not encoder_decoder if told is None else bool(told)
        virtual = virtual_tokens(model) if shifted else 0
        asks = chosen and config is not None and problem is None and _asks_labels(base, loss)
        kind = ClassifierOutput if asks else OUTPUTS[name]
        return kind(shifted, keep_labels=encoder_decoder or _demands_labels(base), virtual=virtual, chosen=chosen)

    def split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs and the labels, aligned with the logits.

        Raises:
            ValueError: there are no labels, or they are not of this output's kind.
        """
        batch = dict(inputs)
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(f"a batch without labels cannot be learned from: it holds {sorted(batch)}")
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels of type {type(labels).__name__} are not supported: a tensor is needed")
        labels = self.convert(labels)
        if not self.keep_labels:
            del batch["labels"]
        aligned = batch.pop("shift_labels", None)
        if aligned is None:
            labels = F.pad(labels, (self.virtual, 0), value=IGNORED) if self.virtual else labels
            aligned = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self.shifted else labels
        return batch, aligned

    @staticmethod
    def count(labels: Tensor) -> Tensor:
        """Number of label tokens, a scalar. Raises ValueError if it is zero."""
        tokens = labels.ne(IGNORED).sum()
        if tokens == 0:
            raise ValueError(f"every label of the batch is ignored ({IGNORED}): there is nothing to learn from")
        return tokens

    def total(self, outputs: Any, labels: Tensor, *, checked: bool = False) -> Tensor:
        """Nats per sequence, [batch]: this energy of `outputs["logits"]`, and what the model adds under "energy".

        The latter, [batch], is for models with a term of their own, such as a latent's divergence from its prior.
        With `checked` the labels were in range before, and are not looked at, which would wait for a GPU.
        """
        if not isinstance(outputs, Mapping):
            raise ValueError(
                f'the model\'s forward returns a {type(outputs).__name__}: a dictionary with "logits" is needed, as '
                "a ModelOutput is"
            )
        if "logits" not in outputs:
            raise ValueError(
                "the model returns no logits, which labels are compared with: a class with a head is needed"
            )
        if not checked:
            self.check(outputs["logits"], labels)
        energy = self.energy(outputs["logits"], labels)
        own = outputs.get("energy")
        return energy if own is None else energy + own

    def perplexity_of(self, labels: Tensor) -> bool:
        """Whether exp(nats per label) is a perplexity."""
        return self.has_perplexity

    def convert(self, labels: Tensor) -> Tensor:
        """The labels in the dtype that `energy` takes. Raises ValueError if they cannot be labels of this output."""
        return labels

    def check(self, logits: Tensor, labels: Tensor) -> None:
        """Raise ValueError if labels have another shape than the logits, or one that these have no place for."""

    @abstractmethod
    def energy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Nats per sequence, [batch], where `check` finds nothing; labels of -100 are ignored."""

    def draw(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels drawn from the distribution that the logits are of; -100 where `labels` are."""
        labels = labels.to(logits.device)
        return torch.where(labels.ne(IGNORED), self.sample(_scores(logits), labels).view(labels.shape), labels)

    @abstractmethod
    def sample(self, scores: Tensor, labels: Tensor) -> Tensor:
        """For each of the labels one draw from the distribution of the scores, [batch, ..., classes or features]."""

    def tell(self, config: Any, labels: Tensor) -> None:
        """Write into a model's configuration what kind its labels are, where its own loss would."""


OUTPUTS: Registry[type[Output]] = Registry("output")
register_output = OUTPUTS.register


@register_output("categorical")
class CategoricalOutput(Output):
    """Cross-entropy, L = -log softmax(logits)[label] (arXiv 2211.03481, section 3.2)."""

    has_perplexity = True

    def convert(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point():
            raise ValueError(
                f"labels of dtype {labels.dtype} are no class indices: choose the output 'gaussian' or 'bernoulli'"
            )
        return labels.long()

    def check(self, logits: Tensor, labels: Tensor) -> None:
        if labels.shape not in (logits.shape[:-1], (*logits.shape[:-1], 1)):
            more = "; for one number per logit choose the output 'gaussian' or 'bernoulli'"
            wanted = "one class index per row of logits"
            raise _unfit(logits, labels, wanted, more if logits.shape == labels.shape else "")
        flat = labels.flatten()
        wrong = flat.ne(IGNORED) & ((flat < 0) | (flat >= logits.shape[-1]))
        if bool(wrong.any()):
            raise ValueError(f"label {int(flat[wrong][0])} is out of range: 0 to {logits.shape[-1] - 1} or {IGNORED}")

    def energy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Nats per sequence, [batch], for logits [batch, ..., classes] and aligned labels [batch, ...]."""
        flat = labels.flatten().to(logits.device)
        nats = F.cross_entropy(_scores(logits).flatten(0, -2), flat, ignore_index=IGNORED, reduction="none")
        return nats.view(len(logits), -1).sum(1)

    def sample(self, scores: Tensor, labels: Tensor) -> Tensor:
        return scores.softmax(-1).nan_to_num(1.0).flatten(0, -2).multinomial(1)  # a guard reports what is not finite


class _DenseOutput(Output):
    """One number per feature: labels have the shape of the logits, and each of them counts as one."""

    looks = True

    def convert(self, labels: Tensor) -> Tensor:
        if self.chosen and bool(labels.eq(IGNORED).any()):
            kind = OUTPUTS.name_of(type(self))
            raise ValueError(
                f"a label is {IGNORED}, which is ignored here and is none to the model's own loss: if it is to be "
                f"ignored say PCConfig.output={kind!r}, if not shift or scale the labels"
            )
        return labels.float() if not labels.is_floating_point() else labels

    def check(self, logits: Tensor, labels: Tensor) -> None:
        if logits.shape not in (labels.shape, (*labels.shape, 1)):
            raise _unfit(logits, labels, "one number per logit")

    def energy(self, logits: Tensor, labels: Tensor) -> Tensor:
        scores = _scores(logits)
        if scores.shape == (*labels.shape, 1):
            scores = scores.squeeze(-1)
        labels = labels.to(device=scores.device, dtype=scores.dtype)
        counted = labels.ne(IGNORED)
        return torch.where(counted, self.nats(scores, labels), 0.0).view(len(labels), -1).sum(1)

    @abstractmethod
    def nats(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Elementwise -log p(label | score)."""


@register_output("gaussian")
class GaussianOutput(_DenseOutput):
    """Half the squared error: -log N(label | logit, 1) without its constant (arXiv 2211.03481, eq. 3)."""

    def convert(self, labels: Tensor) -> Tensor:
        labels = super().convert(labels)
        if not bool(labels.isfinite().all()):
            raise ValueError("labels that are not finite are not allowed: a Gaussian output needs numbers")
        return labels

    def nats(self, scores: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (scores - labels).square()

    def sample(self, scores: Tensor, labels: Tensor) -> Tensor:
        return scores + torch.randn_like(scores)


@register_output("bernoulli")
class BernoulliOutput(_DenseOutput):
    """Binary cross-entropy of labels in [0, 1], each the probability of a one."""

    def convert(self, labels: Tensor) -> Tensor:
        labels = super().convert(labels)
        wrong = labels.ne(IGNORED) & ~((labels >= 0) & (labels <= 1))
        if bool(wrong.any()):
            raise ValueError(f"label {float(labels[wrong][0]):g} is outside [0, 1], where a Bernoulli output needs it")
        return labels

    def nats(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")

    def sample(self, scores: Tensor, labels: Tensor) -> Tensor:
        return scores.sigmoid().bernoulli()


class ClassifierOutput(Output):
    """Of a classifier whose configuration names no `problem_type`, and whose own loss asks the labels for it.

    Class indices are one of several classes; floating-point labels are several yes or no, a Bernoulli output.
    """

    @staticmethod
    def of_labels(labels: Tensor) -> Output:
        """The output that labels of this dtype are of."""
        return SEVERAL_LABELS if labels.is_floating_point() else ONE_CLASS

    def tell(self, config: Any, labels: Tensor) -> None:
        """As transformers does: pipelines go by it."""
        if getattr(config, "problem_type", None) is None:
            config.problem_type = f"{'multi' if labels.is_floating_point() else 'single'}_label_classification"

    def perplexity_of(self, labels: Tensor) -> bool:
        return self.of_labels(labels).perplexity_of(labels)

    def convert(self, labels: Tensor) -> Tensor:
        with _told_why(labels):
            return self.of_labels(labels).convert(labels)

    def check(self, logits: Tensor, labels: Tensor) -> None:
        with _told_why(labels):
            self.of_labels(labels).check(logits, labels)

    def energy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.of_labels(labels).energy(logits, labels)

    def sample(self, scores: Tensor, labels: Tensor) -> Tensor:
        return self.of_labels(labels).sample(scores, labels)


ONE_CLASS, SEVERAL_LABELS = CategoricalOutput(chosen=True), BernoulliOutput(chosen=True)


def _demands_labels(model: nn.Module) -> bool:
    """Whether a model's forward cannot be called without labels."""
    labels = inspect.signature(model.forward).parameters.get("labels")
    return labels is not None and labels.default is inspect.Parameter.empty


def _asks_labels(model: nn.Module, loss: Any) -> bool:
    """Whether a model's own loss takes the kind of a classification from the labels' dtype."""
    names = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    used = () if names is None else names.co_names
    return "problem_type" in used or ("loss_function" in used and loss is ForSequenceClassificationLoss)


@contextmanager
def _told_why(labels: Tensor) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        kind = "numbers, which are several yes or no" if labels.is_floating_point() else "class indices"
        raise ValueError(
            f"{error} (this classifier names no problem_type: labels of dtype {labels.dtype} are {kind})"
        ) from None


def _unfit(logits: Tensor, labels: Tensor, needed: str, more: str = "") -> ValueError:
    shapes = f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}"
    return ValueError(f"{shapes}: {needed} is needed{more}")


def _scores(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
