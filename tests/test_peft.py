"""Adapters: the nodes sit on the base model's blocks, and the adapter learns as under backprop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from test_invariants import batch, gradients, make, worst
from test_trainer import trainer
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification

from hf_pc import PCConfig, PCModel

ADAPTERS: dict[str, Any] = {
    "lora": lambda: LoraConfig(target_modules=["c_attn", "c_fc"], r=2, init_lora_weights="gaussian"),
    "dora": lambda: LoraConfig(target_modules=["c_attn", "c_fc"], r=2, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"]),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "cartridge": lambda: CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
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


@pytest.mark.parametrize("name", [*ADAPTERS, "modules_to_save"])
def test_training_moves_the_adapter_alone(tmp_path: Path, name: str) -> None:
    """After a run frozen weights have their bits, every other one moved; the adapter loads, and merges, with PEFT."""
    torch.manual_seed(0)
    saved = LoraConfig(target_modules=["c_attn"], r=2, modules_to_save=["ln_f"])
    model = get_peft_model(make("gpt2"), saved if name == "modules_to_save" else ADAPTERS[name]())
    before = {key: value.clone() for key, value in model.named_parameters()}
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert name != "modules_to_save" or any("ln_f" in key for key in trained)
    run = trainer(tmp_path, PCConfig(sweeps=3, relative_std=0.3), model=model, max_steps=4, learning_rate=0.1)
    run.train()
    moved = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
    assert moved == trained
    run.save_model(str(tmp_path / "adapter"))
    plain = PeftModel.from_pretrained(make("gpt2").eval(), tmp_path / "adapter").eval()
    inputs = batch()
    expected = model.eval()(**inputs).logits
    torch.testing.assert_close(plain(**inputs).logits, expected)
    if name not in ("prefix", "prompt", "cartridge"):  # which have no weights to merge into
        torch.testing.assert_close(plain.merge_and_unload()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


def test_the_maps_of_a_head_are_nodes_with_an_adapter_too() -> None:
    """`linear` finds in a head that PEFT trains whole what it finds in a plain one, in the copy that is in use."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}  # fmt: skip
    model = RobertaForSequenceClassification(RobertaConfig(**sizes))
    plain = [node.name for node in PCModel(model, PCConfig(nodes="linear")).nodes]
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    adapted.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    pc = PCModel(adapted, PCConfig(nodes="linear", sweeps=8))
    found = [node.name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for node in pc.nodes]
    assert found == plain
    assert found[-1] == "classifier.dense"
    report = pc.accumulate_grad(input_ids=torch.arange(5, 13).view(2, 4), labels=torch.tensor([0, 1]))
    assert all(bool(error.any()) for error in report.errors.values())


@pytest.mark.parametrize("name", ADAPTERS)
def test_relaxation_converges(name: str) -> None:
    """With an adapter the errors reach the equilibrium."""
    torch.manual_seed(0)
    model = get_peft_model(make("gpt2").double(), ADAPTERS[name]()).double()
    assert PCModel(model, PCConfig(sweeps=30, relative_std=0.5)).relax(**batch()).residual < 1e-3


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_logged_loss_is_that_of_evaluation(tmp_path: Path, name: str) -> None:
    """Nats per label token at the same weights, also where virtual tokens make a target of the first label."""
    torch.manual_seed(0)
    data = [{"input_ids": [(7 * i + j) % 50 for j in range(8)], "labels": [(7 * i + j) % 50 for j in range(8)]}
            for i in range(4)]  # fmt: skip
    model = get_peft_model(make("gpt2"), ADAPTERS[name]())
    run = trainer(tmp_path, model=model, train_dataset=data, learning_rate=0.0, max_steps=1, weight_decay=0.0)
    run.train()
    (logged,) = [log["loss"] for log in run.state.log_history if "loss" in log]
    assert logged == pytest.approx(run.evaluate(data)["eval_loss"], rel=1e-3)


def test_a_prompt_is_loaded_and_learns_on(tmp_path: Path) -> None:
    """Though PEFT loads prompts to be used: what is in them is a weight all the same."""
    make("gpt2").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    pc = PCModel(adapted, PCConfig(sweeps=2))
    pc.save_pretrained(tmp_path / "prompt")
    loaded = PCModel.from_pretrained(tmp_path / "prompt")
    expected, found = (one.relax(**batch()).feedforward_energy for one in (pc, loaded))
    assert found == pytest.approx(expected, rel=1e-5)
    gradient = [one.accumulate_grad(**batch()) and one.model.prompt_encoder.default.embedding.weight.grad
                for one in (pc, loaded)]  # fmt: skip
    torch.testing.assert_close(*gradient)
