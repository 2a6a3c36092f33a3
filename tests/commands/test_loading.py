"""What commands load, and the random batches they try a model with."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ViTConfig,
    ViTForMaskedImageModeling,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_pc import PCConfig, PCModel
from hf_pc.commands.loading import model_class, random_batch, random_input, refuse_adapter, smallest_input
from hf_pc.output import Output

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_classes_that_load_no_model_are_named() -> None:
    """Only the AutoModel classes of transformers load a model."""
    for name in ("BertModel", "AutoModelForNothing"):
        with pytest.raises(ValueError, match=f"--auto_class '{name}' is no AutoModel class"):
            model_class(argparse.Namespace(auto_class=name), BertConfig())


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


SOUNDS: dict[str, Any] = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20,
                          "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 10,
                          "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
                          "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "suppress_tokens": None,
                          "begin_suppress_tokens": None}  # fmt: skip
WAVES: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "mask_time_prob": 0.0,
                         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
                         "num_feat_extract_layers": 2}  # fmt: skip
TRIED: dict[str, Any] = {
    "tokens": lambda: BertForTokenClassification(BertConfig(vocab_size=20, num_labels=3, **SIZE)),
    "choices": lambda: BertForMultipleChoice(BertConfig(vocab_size=20, **SIZE)),
    "whisper": lambda: WhisperForConditionalGeneration(WhisperConfig(**SOUNDS)),
    "wav2vec2": lambda: Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZE, **WAVES)),
    "ast": lambda: ASTForAudioClassification(ASTConfig(**SIZE, max_length=32, num_mel_bins=16)),
}


@pytest.mark.parametrize("name", TRIED)
def test_heads_and_sounds_are_tried(name: str) -> None:
    """A batch that the model takes, with labels that it has a class for, relaxes."""
    model = TRIED[name]().eval()
    inputs = random_batch(model, batch=2, sequence=6)
    with torch.no_grad():
        assert bool(model(**inputs).loss.isfinite())
        model(**smallest_input(model))
    assert PCModel(model, PCConfig(sweeps=2, relative_std=0.1)).relax(**inputs).free_energy > 0


def test_other_inputs_and_targets_are_named() -> None:
    """What the commands cannot make up they say."""
    with pytest.raises(ValueError, match="BertForQuestionAnswering learns from start_positions, end_positions"):
        random_batch(BertForQuestionAnswering(BertConfig(vocab_size=20, **SIZE)), batch=2, sequence=5)
    other = SimpleNamespace(config=None, device="cpu", main_input_name="past_values")
    with pytest.raises(ValueError, match="SimpleNamespace takes 'past_values': this command knows none to try"):
        smallest_input(other)


def test_images_have_two_sides() -> None:
    """Of a model for images the input has its channels and sides, which may differ; labels there are none."""
    model = ViTForMaskedImageModeling(ViTConfig(**SIZE, image_size=[8, 16], patch_size=4, encoder_stride=4))
    assert random_input(model, batch=2, sequence=5)["pixel_values"].shape == (2, 3, 8, 16)
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling: this command knows no labels for it"):
        random_batch(model, batch=2, sequence=5)
