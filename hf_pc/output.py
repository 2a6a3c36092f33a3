"""The output node: cross-entropy of the labels, per sequence, from a model's logits.

transformers' own losses are means whose denominator depends on the class (several classes ignore
`num_items_in_batch`, gpt2's evaluation counts a position that is no target). Here the sum over label tokens is
computed once and the caller divides it once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IGNORED = -100


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


@dataclass(frozen=True)
class CategoricalOutput:
    """Categorical output energy, L = -log softmax(logits)[label] (arXiv 2211.03481, section 3.2).

    Args:
        shifted: logits at position i predict the label at i + 1, as in causal language models.
        keep_labels: labels stay among the model's inputs, as encoder-decoders build the decoder's input from them.
    """

    shifted: bool
    keep_labels: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> CategoricalOutput:
        """The output energy that fits a transformers model: what its own loss does with labels."""
        base = base_model(model)
        encoder_decoder = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        causal = (
            LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss
            or type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        )
        return cls(shifted=causal and not encoder_decoder, keep_labels=encoder_decoder)

    def split(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """The model's inputs and the labels, aligned with the logits.

        Raises:
            ValueError: there are no labels, they are no class indices, or every one of them is ignored.
        """
        batch = dict(inputs)
        labels = batch.get("labels")
        if labels is None:
            raise ValueError(f"a batch without labels cannot be learned from: it holds {sorted(batch)}")
        if labels.is_floating_point():
            raise ValueError(f"labels of dtype {labels.dtype} are not supported: class indices are needed")
        if not self.keep_labels:
            del batch["labels"]
        aligned = batch.pop("shift_labels", None)
        if aligned is None:
            aligned = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if self.shifted else labels
        return batch, aligned

    @staticmethod
    def count(labels: Tensor) -> Tensor:
        """Number of label tokens, a scalar. Raises ValueError if it is zero."""
        tokens = labels.ne(IGNORED).sum()
        if tokens == 0:
            raise ValueError(f"every label of the batch is ignored ({IGNORED}): there is nothing to learn from")
        return tokens

    @staticmethod
    def energy(logits: Tensor, labels: Tensor) -> Tensor:
        """Nats per sequence, [batch], for logits [batch, ..., classes] and aligned labels [batch, ...]."""
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: "
                "one class index per row of logits is needed"
            )
        scores = logits.flatten(0, -2)
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        nats = F.cross_entropy(scores, labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="none")
        return nats.view(len(logits), -1).sum(1)


def auxiliary_loss(model: nn.Module, outputs: Any) -> Tensor | float:
    """A mixture of experts' router loss, weighted as its own forward does when it is given labels; else 0."""
    loss = outputs.get("aux_loss")
    config = getattr(base_model(model), "config", None)
    return 0.0 if loss is None else loss * getattr(config, "router_aux_loss_coef", 0.0)
