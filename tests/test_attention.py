"""Attention logits as nodes: eager attention at zero errors, backprop at one sweep, masks, and who is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_invariants import batch, gradients, make, worst
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.attention import attention_forward

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(name: str) -> Any:
    set_seed(0)
    if name in ("gpt2", "llama"):  # the latter with grouped key/value heads
        return make(name)
    if name == "bert":
        return BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16))
    if name == "t5":
        sizes = {"vocab_size": 50, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder")
              for what, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 2))}  # fmt: skip
    config = BartConfig(vocab_size=50, d_model=32, max_position_embeddings=32, dropout=0.0, **layers, **ends)
    return BartForConditionalGeneration(config)


MODELS = ["gpt2", "llama", "gemma2", "bert", "t5", "bart"]


def eager(name: str) -> Any:
    model = build(name)
    model.set_attn_implementation("eager")
    return model.train()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("energy", ["categorical", "gaussian"])
def test_zero_errors_are_eager_attention(name: str, energy: str) -> None:
    """An attached model that is not relaxing gives eager attention's logits, padding and causality included."""
    inputs = batch()
    expected = eager(name)(**inputs).logits
    model = build(name).train()
    before = model.config._attn_implementation
    pc = PCModel(model, PCConfig(attention_energy=energy))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    pc.relax(**inputs)
    assert [node.name for node in pc.nodes if node.name.endswith("logits")]
    pc.detach()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", MODELS)
def test_one_gaussian_sweep_is_backprop(name: str) -> None:
    """With Gaussian attention nodes one sweep leaves backprop's gradient."""
    inputs = batch()
    reference = build(name).train()
    PCModel(reference, PCConfig(sweeps=1, precision=1.0, step_size=1.0)).accumulate_grad(**inputs)
    model = build(name).train()
    settings = {"sweeps": 1, "precision": 1.0, "step_size": 1.0, "attention_energy": "gaussian"}
    PCModel(model, PCConfig(**settings)).accumulate_grad(**inputs)
    expected, found = gradients(reference), gradients(model)
    for parameter, gradient in expected.items():  # key biases have no effect: their gradient is rounding
        assert (found[parameter] - gradient).norm() < 1e-5 * gradient.norm() + 1e-9, parameter


@pytest.mark.parametrize("energy", ["categorical", "gaussian"])
@pytest.mark.parametrize("solver", ["error", "state"])
def test_relaxation_moves_logits_and_descends(energy: str, solver: str) -> None:
    """More sweeps never raise F; the logits leave their prediction, those of masked keys do not."""
    model, before = make("gpt2"), None
    for sweeps in (2, 4, 8):
        config = PCConfig(attention_energy=energy, nodes="linear", relative_std=1.0, sweeps=sweeps, solver=solver)
        pc = PCModel(model, config)
        found = pc.relax(**batch())
        pc.detach()
        assert before is None or found.free_energy <= before * (1 + 1e-6)
        before = found.free_energy
    error = found.errors["transformer.h.2.attn.logits"]
    assert error.shape == (4, 2, 16, 16)
    assert error.abs().max() > 0
    assert (error.triu(1) == 0).all()


def test_categorical_attention_tends_to_backprop() -> None:
    """As errors vanish, one KL sweep's gradient tends to backprop's: its step is the natural one."""
    reference = make("gpt2").double()
    PCModel(reference, PCConfig(sweeps=1)).accumulate_grad(**batch())
    distances = []
    for relative_std in (1.0, 0.1, 0.01):
        model = make("gpt2").double()
        PCModel(model, PCConfig(sweeps=1, relative_std=relative_std, attention_energy="categorical")).accumulate_grad(
            **batch()
        )
        distances.append(worst(gradients(model), gradients(reference)))
    assert distances[2] < 1e-4
    assert distances[0] > distances[1] > distances[2]


def test_saved_while_attached(tmp_path: Path) -> None:
    """A checkpoint saved with attention nodes on names no attention of ours, and loads as ever."""
    model = make("gpt2")
    pc = PCModel(model, PCConfig(attention_energy="categorical"))
    pc.save_pretrained(tmp_path)
    assert "hf_pc" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation != model.config._attn_implementation


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_unsupported_architectures_are_named(name: str) -> None:
    """An architecture that bypasses the attention interface is refused, with its name, and left as it was."""
    if name == "bloom":
        model: Any = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2))
    else:
        model = GPTJForCausalLM(GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=2, rotary_dim=4))
    with pytest.raises(ValueError, match=type(model).__name__):
        PCModel(model, PCConfig(attention_energy="categorical")).relax(**batch())


@pytest.mark.parametrize("energy", ["categorical", "gaussian", "laplace"])
def test_padding_changes_nothing(energy: str) -> None:
    """Keys that are padding, and the future, take no part in the strength of a node on attention logits."""
    inputs = {name: values[:1] for name, values in batch().items()}
    padded = {name: torch.nn.functional.pad(values, (0, 5), value=-100 if name == "labels" else 0)
              for name, values in inputs.items()}  # fmt: skip
    found = []
    for given in (inputs, padded):
        model = make("gpt2").double()
        PCModel(model, PCConfig(attention_energy=energy, relative_std=2.0, sweeps=6)).accumulate_grad(**given)
        found.append(gradients(model))
    assert worst(found[0], found[1]) < 1e-6


@pytest.mark.parametrize("name", ["sinks", "s_aux"])
def test_sinks_that_are_given_are_refused(name: str) -> None:
    """By whichever argument a model hands them over: without them another function would be computed."""
    heads = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="Identity has attention sinks"):
        attention_forward(torch.nn.Identity(), heads, heads, heads, None, **{name: torch.zeros(2)})
