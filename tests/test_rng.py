"""Every sweep of a step draws the same, from whichever generator, and each process what no other does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, set_seed

from hf_pc import PCConfig, PCModel
from hf_pc.rng import RandomState, own_stream


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
