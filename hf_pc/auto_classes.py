"""Which of transformers' auto classes a model belongs to, or a checkpoint is loaded by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class AutoClass:
    """An auto class with a head.

    Args:
        name: in transformers.
        task: what the Hub knows such models by.
        models: the table of their classes, in transformers.
        adapters: what PEFT calls the task of their adapters; None if it has no name for it.
    """

    name: str
    task: str
    models: str
    adapters: str | None = None


CAUSAL = "AutoModelForCausalLM"
AUTO_CLASSES = (
    AutoClass(CAUSAL, "text-generation", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    AutoClass(
        "AutoModelForSeq2SeqLM", "text2text-generation", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "SEQ_2_SEQ_LM",
    ),
    AutoClass("AutoModelForMaskedLM", "fill-mask", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    AutoClass(
        "AutoModelForSequenceClassification", "text-classification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "SEQ_CLS",
    ),
    AutoClass(
        "AutoModelForTokenClassification", "token-classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "TOKEN_CLS",
    ),
    AutoClass(
        "AutoModelForImageClassification", "image-classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    ),
)  # fmt: skip
#: of each name, the task that the Hub knows such models by
TASKS = {auto.name: auto.task for auto in AUTO_CLASSES}


def class_of(model: nn.Module) -> str:
    """What of transformers loads the model: the auto class that has it, else its own."""
    own = type(model).__name__
    return next((auto.name for auto in AUTO_CLASSES if own in getattr(modeling_auto, auto.models).values()), own)


def adapted(task: str | None) -> Any:
    """What loads the base model of an adapter that PEFT notes this task of; None where it notes none of these."""
    names = (auto.name for auto in AUTO_CLASSES if task is not None and auto.adapters == task)
    return next((getattr(transformers, name) for name in names), None)


def loaded_by(settings: Any) -> Any:
    """What of transformers loads a checkpoint with these settings in its config.json.

    It is the class that the checkpoint was saved from; where that has no head, or is not told, AutoModelForCausalLM;
    where code comes with it, the auto class that this is for.

    Raises:
        ValueError: it was saved from a class that transformers does not have.
    """
    settings = settings if isinstance(settings, Mapping) else {}
    names, code = settings.get("architectures"), settings.get("auto_map")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(code, Mapping) and (autos := [auto for auto in code if auto.startswith("AutoModelFor")]):
        name = CAUSAL if CAUSAL in autos else autos[0]
        return getattr(transformers, name, transformers.AutoModelForCausalLM)
    if not isinstance(name, str) or code or name in _headless():
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"config.json names {name!r}, which transformers does not have: give auto_class")
    kind = getattr(getattr(found, "config_class", None), "model_type", None)
    return found if settings.get("model_type", kind) == kind else transformers.AutoModelForCausalLM


def _headless() -> set[str]:
    found: set[str] = set()
    for names in modeling_auto.MODEL_MAPPING_NAMES.values():
        found |= {names} if isinstance(names, str) else set(names)
    return found
