"""The table of auto classes against those who know: transformers and PEFT."""

from __future__ import annotations

import transformers
from peft import TaskType
from test_invariants import make
from torch import nn
from transformers.models.auto import modeling_auto

from hf_pc.auto_classes import AUTO_CLASSES, adapted, class_of


def test_every_auto_class_is_theirs() -> None:
    """Names, tables of models and tasks of adapters exist."""
    for auto in AUTO_CLASSES:
        assert getattr(transformers, auto.name).__name__ == auto.name
        assert getattr(modeling_auto, auto.models)
        if auto.adapters is not None:
            assert TaskType(auto.adapters)
            assert adapted(auto.adapters) is getattr(transformers, auto.name)
    assert adapted(None) is None
    assert adapted("FEATURE_EXTRACTION") is None


def test_a_model_is_of_its_auto_class() -> None:
    """Or, where none has it, of its own."""
    assert class_of(make("gpt2")) == "AutoModelForCausalLM"
    assert class_of(nn.Linear(1, 1)) == "Linear"
