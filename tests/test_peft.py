"""Adapters: the nodes sit on the base model's blocks, and the adapter learns as under backprop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_invariants import batch, gradients, make, worst

from hf_pc import PCConfig, PCModel

ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["c_attn", "c_fc"], r=2, init_lora_weights="gaussian"),
    "dora": lambda: LoraConfig(target_modules=["c_attn", "c_fc"], r=2, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_sweep_is_backprop(name: str) -> None:
    """T = 1 equals the gradient of PEFT's own loss; frozen weights get none and keep their bits."""
    torch.manual_seed(0)
    model = get_peft_model(make("gpt2").double(), ADAPTERS[name]()).double().eval()
    before = {key: value.clone() for key, value in model.named_parameters()}
    inputs = batch()
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    PCModel(model, PCConfig(sweeps=1)).accumulate_grad(**inputs)
    found = gradients(model)
    assert expected.keys() == found.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
    assert worst(found, expected) < 1e-6
    assert all(torch.equal(before[key], value) for key, value in model.named_parameters())


@pytest.mark.parametrize("name", ADAPTERS)
def test_relaxation_converges(name: str) -> None:
    """With an adapter the errors reach the equilibrium."""
    torch.manual_seed(0)
    model = get_peft_model(make("gpt2").double(), ADAPTERS[name]()).double()
    assert PCModel(model, PCConfig(sweeps=30, relative_std=0.5)).relax(**batch()).residual < 1e-3
