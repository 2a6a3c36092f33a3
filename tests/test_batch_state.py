"""What a pass leaves behind, draws or writes to counts once in a step, however many passes it makes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from test_invariants import batch, make
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.rng import RandomState, own_stream

#: passes of several phases, one that starts at rest twice, and pieces
WAYS: list[dict[str, Any]] = [{}, {"learning": "extrapolated"}, {"learning": "wake_sleep"}, {"solver": "state"}]


def resnet() -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")).train()


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_the_generators_of_other_accelerators_are_replayed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind of device a model is on, its generator is put back; one that has one device names none."""
    states = {"now": torch.tensor([1])}

    class Module:
        @staticmethod
        def get_rng_state(*device: torch.device) -> torch.Tensor:
            assert len(device) == (kind != "mps")
            return states["now"]

        @staticmethod
        def set_rng_state(state: torch.Tensor, *device: torch.device) -> None:
            assert len(device) == (kind != "mps")
            states["now"] = state

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    kept = RandomState([torch.device(kind), torch.device("cpu")], numpy=False)
    states["now"] = torch.tensor([2])
    kept.restore()
    assert int(states["now"]) == 1


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
def test_running_statistics_count_a_batch_once(way: dict[str, Any]) -> None:
    """BatchNorm's are those of a plain forward pass in training mode, and a later one counts again."""
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    plain, model = resnet(), resnet()
    pc = PCModel(model, PCConfig(sweeps=4, relative_std=0.3, **way))
    for _ in range(2):
        plain(pixel_values=inputs["pixel_values"])
        pc.accumulate_grad(**inputs)
    pc.relax(**inputs)  # learns nothing, and counts nothing
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def wav2vec2(share: float) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
                             "num_attention_heads": 2, "conv_dim": (16, 16), "conv_stride": (5, 4),
                             "conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                             "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "vocab_size": 48,
                             "num_labels": 3, "initializer_range": 0.3}  # fmt: skip
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop",
                           "activation_dropout"), 0.0)  # fmt: skip
    config = Wav2Vec2Config(**sizes, **still, mask_time_prob=share, mask_time_length=5)
    return Wav2Vec2ForSequenceClassification(config).train()


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_masks_that_numpy_draws_are_the_same_in_every_sweep(share: float) -> None:
    """SpecAugment: no sequence ends above rest and none is refused, as without masks; each step draws anew."""
    set_seed(0)
    pc = PCModel(wav2vec2(share), PCConfig(sweeps=4, relative_std=0.05))
    inputs = {"input_values": torch.randn(4, 2000), "labels": torch.tensor([0, 1, 2, 0])}
    reports = [pc.accumulate_grad(**inputs) for _ in range(3)]
    assert all(report.refused == 0 for report in reports)
    assert all(report.free_energy < report.feedforward_energy for report in reports)
    assert (len({report.feedforward_energy for report in reports}) > 1) == (share > 0)


def test_every_generator_is_restored() -> None:
    """Python's, numpy's and torch's draw again what they drew."""
    state = RandomState([torch.device("cpu")], numpy=True)
    drawn = [(random.random(), np.random.rand(), float(torch.rand(()))) for _ in range(2) if state.restore() is None]
    assert drawn[0] == drawn[1]


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


def test_processes_draw_their_own() -> None:
    """Each process, in each step, draws from every generator what no other does; behind it all draw alike."""
    seen, behind = [], []
    for index in (0, 1, 0):
        if index == 1 or not seen:
            set_seed(0)  # processes begin alike
        with own_stream(index, []):
            seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        behind.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert behind[0] == behind[1]
    assert all(len({*drawn}) == len(drawn) for drawn in zip(*seen, strict=True))
