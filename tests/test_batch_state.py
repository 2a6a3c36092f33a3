"""What a pass leaves behind, draws or writes to counts once in a step, however many passes it makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_invariants import batch, make
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_pc import PCConfig, PCModel

#: passes of several phases, one that starts at rest twice, and pieces
WAYS: list[dict[str, Any]] = [{}, {"learning": "extrapolated"}, {"learning": "wake_sleep"}, {"solver": "state"}]


def resnet() -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")).train()


def test_no_dropout_is_no_other_batchnorm() -> None:
    """With dropout="off" BatchNorm trains as it does otherwise; where it is frozen it stays so."""
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16).double(), "labels": torch.tensor([0, 1, 2, 0])}
    for frozen in (False, True):
        found = []
        for dropout in ("off", "replay"):
            model = resnet().double()
            norm = model.resnet.embedder.embedder.normalization.train(not frozen)
            PCModel(model, PCConfig(dropout=dropout, relative_std=0.3)).accumulate_grad(**inputs)  # type: ignore[arg-type]
            assert int(norm.num_batches_tracked) == int(not frozen)
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert torch.equal(*found)


def test_no_dropout_does_not_end_checkpointing_unasked() -> None:
    """transformers checkpoints in training mode alone: that is said where dropout="off" would leave it."""
    model = make("gpt2").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"dropout='off' does without training mode"):
        PCModel(model, PCConfig(dropout="off")).accumulate_grad(**batch())
    assert model.training


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_count_a_batch_once(kind: Any, way: dict[str, Any]) -> None:
    """They are those of a plain forward pass in training mode, and a later one counts again."""
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    plain, model = resnet(), resnet()
    for embedder in (plain.resnet.embedder.embedder, model.resnet.embedder.embedder):
        embedder.normalization = kind(8, track_running_stats=True)
    pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.3, **way))
    own = list(model.buffers())
    for _ in range(2):
        plain(pixel_values=inputs["pixel_values"])
        pc.accumulate_grad(**inputs)
    pc.relax(**inputs)  # learns nothing, and counts nothing
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert all(one is other for one, other in zip(model.buffers(), own, strict=True))
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, _NormBase))


def whisper() -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
                             "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
                             "decoder_start_token_id": 1, "pad_token_id": 0, "suppress_tokens": None,
                             "begin_suppress_tokens": None, "dropout": 0.0}  # fmt: skip
    config = WhisperConfig(**sizes, apply_spec_augment=True, mask_time_prob=0.2, mask_time_length=2)
    return WhisperForConditionalGeneration(config).train()


@pytest.mark.parametrize("way", [*WAYS, {"learning": "balanced"}], ids=str)
def test_what_a_model_writes_into_its_inputs(way: dict[str, Any]) -> None:
    """Whisper masks its features in place: the caller's stay as they are, and it learns as with a copy of its own."""
    features, labels = torch.randn(4, 8, 40) + 5, torch.randint(3, 64, (4, 6))
    given = features.clone()
    pc = PCModel(whisper(), PCConfig(sweeps=4, relative_std=0.05, **way))
    np.random.seed(0)
    report = pc.accumulate_grad(input_features=given, labels=labels)
    assert torch.equal(given, features)
    assert report.refused == 0
    assert all(p.grad.isfinite().all() for p in pc.model.parameters() if p.grad is not None)
