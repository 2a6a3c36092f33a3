"""Which modules become nodes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from test_invariants import gradients, make, worst
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    FunnelBaseModel,
    FunnelConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    T5GemmaConfig,
    T5GemmaForSequenceClassification,
    T5GemmaModuleConfig,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.architecture import auxiliary_loss, plainly, routes
from hf_pc.placement import blocks, resolve

IMAGE = 2  # the token that stands for a patch; an image has four


def llava() -> Any:
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                             "intermediate_size": 48, "initializer_range": 0.3}  # fmt: skip
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=1, max_position_embeddings=64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_token_id=IMAGE)
    config.vision_feature_layer = -1
    return LlavaForConditionalGeneration(config).eval()


def story(images: list[int]) -> dict[str, torch.Tensor]:
    """As many sequences of 18 tokens, each with so many images in front."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 64, (len(images), 18), generator=generator)
    for row, count in zip(ids, images, strict=True):
        row[: 4 * count] = IMAGE
    pixels = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
            "labels": ids.masked_fill(ids == IMAGE, -100)}  # fmt: skip


@pytest.mark.parametrize("images", [[2, 1, 0], [1, 0, 0], [2, 2, 2]])
def test_images_are_nobodys_sequence(images: list[int]) -> None:
    """However many images a batch has, no sequence feels the labels of another; one sweep is backprop in the tower of
    images too."""
    model, inputs = llava(), story(images)
    other = {name: value.clone() for name, value in inputs.items()}
    other["labels"][0, 8:] = (other["labels"][0, 8:] + 1) % 58 + 6
    pc = PCModel(model, PCConfig(relative_std=3.0, sweeps=6))
    found, changed = pc.relax(**inputs), pc.relax(**other)
    assert [name.rpartition(".")[0] for name in found.errors] == ["model.language_model.layers"] * 2
    for name, error in found.errors.items():
        assert not torch.equal(error[0], changed.errors[name][0])
        torch.testing.assert_close(error[1:], changed.errors[name][1:], rtol=1e-4, atol=1e-4)
    pc.detach()
    PCModel(model, PCConfig(sweeps=1, precision=1.0, step_size=1.0)).accumulate_grad(**inputs)
    learned = gradients(model)
    model.zero_grad()
    model(**inputs).loss.backward()
    assert any("vision" in name for name in learned)
    assert worst(learned, gradients(model)) < 1e-4


def blip() -> Any:
    """Whose towers are children of the model."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "intermediate_size": 48}  # fmt: skip
    text = OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32,
                     vocab_size=64)  # fmt: skip
    vision = Blip2VisionConfig(**sizes, image_size=16, patch_size=8)
    former = Blip2QFormerConfig(**sizes, encoder_hidden_size=32)
    config = Blip2Config(vision_config=vision, qformer_config=former, text_config=text)
    config.image_token_index = config.image_token_id = IMAGE
    return Blip2ForConditionalGeneration(config)


def test_attention_is_that_of_the_text() -> None:
    """Logits of attention among patches are no nodes."""
    pc = PCModel(llava(), PCConfig(attention_energy="categorical", relative_std=0.5))
    assert all(name.startswith("model.language_model.") for name in pc.relax(**story([2, 1, 0])).errors)


@pytest.mark.parametrize("build", [llava, blip])
@pytest.mark.parametrize("nodes", ["block", "sublayer", "linear"])
def test_presets_stay_with_the_text(nodes: str, build: Any) -> None:
    """No preset puts a node where images are seen, and a pattern that does is named."""
    names = [node.name for node in resolve(build(), PCConfig(nodes=nodes))]
    assert names
    assert all("language_model." in name for name in names)
    model = llava()
    with pytest.raises(ValueError, match=r"matches 'model.vision_tower.*' can be a node: a batch has as many images"):
        resolve(model, PCConfig(nodes=r"model\.vision_tower\..*layers\.\d"))


@pytest.mark.parametrize("nodes", ["sublayer", "linear"])
def test_norms_that_an_adapter_wraps_are_no_linear_maps(nodes: str) -> None:
    """Tuning the norms by PEFT leaves the nodes of a preset where they were."""
    model = make("llama")
    before = len(resolve(model, PCConfig(nodes=nodes)))
    tuned = get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]))
    assert len(resolve(tuned, PCConfig(nodes=nodes))) == before


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 5, 2])), 9),
        (lambda: FunnelBaseModel(FunnelConfig(vocab_size=20, block_sizes=[2, 1, 2], d_model=16, n_head=2, d_head=8,
                                              d_inner=16)), 5),
    ],
)  # fmt: skip
def test_every_stage_has_nodes(build: Callable[[], nn.Module], count: int) -> None:
    """Lists of the longest one's class are blocks as well, whatever their length."""
    found = blocks(build())
    assert len(found) == count
    assert len({type(block) for block in found.values()}) == 1


def test_an_image_model_of_several_stages_learns_as_by_backprop() -> None:
    """At T = 1, with a node behind each layer of each stage."""
    set_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 5, 1], num_labels=3, drop_path_rate=0.0)
    model = ConvNextForImageClassification(config).double()
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64).double(), "labels": torch.tensor([0, 2])}
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    pc = PCModel(model, PCConfig(sweeps=1))
    assert len(pc.nodes) == 8
    pc.accumulate_grad(**inputs)
    assert worst(expected, gradients(model)) < 1e-9


def test_settings_of_the_text_inside() -> None:
    """A model of images and text keeps no keys and values, and has its router's loss, as its text part says."""
    text = SimpleNamespace(use_cache=True, output_router_logits=True, router_aux_loss_coef=0.5)

    class Both(nn.Module):
        config = SimpleNamespace(get_text_config=lambda: text)

        def forward(self, input_ids: torch.Tensor, use_cache: bool | None = None) -> None: ...

    assert plainly(Both(), {}) == {"use_cache": False}
    assert routes(Both(), {})
    assert not routes(Both(), {"output_router_logits": False})
    assert float(auxiliary_loss(Both(), {"aux_loss": torch.tensor(2.0)})) == 1.0
    other = Both()
    other.config = SimpleNamespace()
    other.aux_loss_coef = 0.25  # type: ignore[assignment]
    assert float(auxiliary_loss(other, {"aux_loss": torch.tensor(2.0)})) == 0.5


def test_blocks_that_are_in_two_lists() -> None:
    """They are found once, by the name that a model lists them under."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(x + self.map(x))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block() for _ in range(4)])
            self.local = nn.ModuleList(self.layers[::2])

    assert list(blocks(Shared())) == [f"layers.{i}" for i in range(4)]
    assert len(resolve(Shared(), PCConfig())) == 4


def test_a_classifier_that_says_so_itself_is_not_told_to_keep_nothing() -> None:
    """T5Gemma's heads pass `use_cache` on by themselves: twice would be an error."""
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    part = T5GemmaModuleConfig(**sizes, layer_types=["full_attention"])
    config = T5GemmaConfig(encoder=part, decoder=part, num_labels=2, pad_token_id=0)
    model = T5GemmaForSequenceClassification(config)
    ids = torch.arange(3, 9)[None]
    found = PCModel(model, PCConfig(sweeps=2)).relax(input_ids=ids, labels=torch.tensor([1]))
    assert found.free_energy > 0
