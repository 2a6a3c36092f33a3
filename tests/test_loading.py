"""What commands load, and the random batches they try a model with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForMaskedImageModeling

from hf_pc.commands.loading import auto_class, random_batch, random_input, refuse_adapter
from hf_pc.output import Output

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_classes_that_load_no_model_are_named() -> None:
    """Only the AutoModel classes of transformers load a model."""
    for name in ("BertModel", "AutoModelForNothing"):
        with pytest.raises(ValueError, match=f"--auto_class '{name}' is no AutoModel class"):
            auto_class(argparse.Namespace(auto_class=name))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    """An adapter's base model may be anywhere: it is refused by name."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: give its base model"):
        refuse_adapter(argparse.Namespace(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "shape", "dtype"),
    [
        ({"num_labels": 3}, (4,), torch.long),
        ({"num_labels": 1}, (4,), torch.float32),
        ({"num_labels": 3, "problem_type": "regression"}, (4, 3), torch.float32),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, (4, 3), torch.float32),
    ],
    ids=str,
)
def test_labels_are_those_of_the_models_own_loss(
    settings: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Classes, numbers and sets of classes: the model takes the batch and its loss is a number."""
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **SIZE, **settings))
    inputs = random_batch(model, batch=4, sequence=5)
    assert inputs["labels"].shape == shape
    assert inputs["labels"].dtype == dtype
    assert bool(model(**inputs).loss.isfinite())
    assert bool(Output.of(model, "auto").split(inputs)[1].isfinite().all())


def test_images_have_two_sides() -> None:
    """Of a model for images the input has its channels and sides, which may differ; labels there are none."""
    model = ViTForMaskedImageModeling(ViTConfig(**SIZE, image_size=[8, 16], patch_size=4, encoder_stride=4))
    assert random_input(model, batch=2, sequence=5)["pixel_values"].shape == (2, 3, 8, 16)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling: this command knows no labels for it"):
        random_batch(model, batch=2, sequence=5)
