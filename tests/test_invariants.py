"""What must always hold, on GPT-2 and Llama blocks: the anchor of every other test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from hf_pc import PCConfig, PCModel

BACKPROP = PCConfig(sweeps=1, precision=1.0, step_size=1.0)


def make(name: str, dropout: float = 0.0) -> Any:
    set_seed(0)
    if name == "gpt2":
        sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 2}
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0)).train()
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": dropout}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0)).train()


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (size, 16), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(size):  # unequal numbers of label tokens, and padding on the right
        labels[row, 16 - 2 * row :] = -100
        mask[row, 16 - 2 * row :] = 0
        labels[row, :row] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in a)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("nodes", ["block", "sublayer", "linear"])
def test_one_sweep_is_backprop(name: str, nodes: str) -> None:
    """One Gaussian sweep from zero errors with step 1/p gives backprop's gradient, dropout and padding included."""
    model, inputs = make(name, dropout=0.1), batch()
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    torch.manual_seed(7)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    reference = gradients(model)
    model.zero_grad()
    pc = PCModel(model, PCConfig(nodes=nodes, sweeps=1, precision=1.0, step_size=1.0))
    torch.manual_seed(7)
    pc.accumulate_grad(**inputs)
    assert worst(gradients(model), reference) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("relative_std", [0.3, 3.0, 30.0])
def test_free_energy_never_rises(name: str, relative_std: float) -> None:
    """With step "auto" no sequence's free energy is higher after one more sweep, however weak the energies."""
    model = make(name)
    before = None
    for sweeps in range(1, 8):
        pc = PCModel(model, PCConfig(sweeps=sweeps, relative_std=relative_std))
        now = pc.relax(**batch()).sequence_free_energy
        pc.detach()
        assert before is None or bool((now <= before * (1 + 2e-6)).all())
        before = now


@pytest.mark.parametrize(("name", "rounding"), [("gpt2", 1e-9), ("llama", 1e-4)])
def test_weights_learn_from_their_own_nodes_energy(name: str, rounding: float) -> None:
    """At equilibrium, in float64, the gradient is autograd's of each node's own energy with all states held fixed.

    Llama's norms compute in float32 whatever the model's dtype, and that rounding is all that is left there.
    """
    model, inputs = make(name).double(), batch()
    pc = PCModel(model, PCConfig(sweeps=60, precision=4000.0))
    out = pc.accumulate_grad(**inputs)
    assert out.residual < rounding
    assert out.relaxed_fraction > 0.001
    learned = gradients(model)
    model.zero_grad()
    pc.detach()
    energies: list[torch.Tensor] = []

    def clamp(key: str) -> Any:
        def hook(module: Any, args: Any, mu: torch.Tensor) -> torch.Tensor:
            energies.append(2000.0 * (out.states[key] - mu).square().sum())
            return out.states[key]

        return hook

    handles = [model.get_submodule(key).register_forward_hook(clamp(key)) for key in out.states]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    local = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") + sum(energies)
    (local / labels.ne(-100).sum()).backward()
    for handle in handles:
        handle.remove()
    assert worst(learned, gradients(model)) < 10 * rounding


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_does_not_depend_on_the_batching(name: str) -> None:
    """One batch of 4 and two of 2, with unequal numbers of label tokens, give the same gradient."""
    model, inputs = make(name), batch()
    tokens = int(inputs["labels"][:, 1:].ne(-100).sum())
    pc = PCModel(model, PCConfig(sweeps=3, relative_std=1.0))
    pc.accumulate_grad(**inputs)
    whole = gradients(model)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        pc.accumulate_grad(num_items_in_batch=tokens, **{k: v[part] for k, v in inputs.items()})
    assert worst(gradients(model), whole) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_model_is_untouched(name: str) -> None:
    """Attached, after relaxing, and detached, logits are bit for bit what they were, and so are keys and config."""
    model, inputs = make(name).eval(), batch()
    keys, config = list(model.state_dict()), model.config.to_dict()
    before = model(input_ids=inputs["input_ids"]).logits
    pc = PCModel(model, BACKPROP)
    pc.relax(**inputs)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)
    pc.detach()
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)
    assert not any(m._forward_hooks for m in model.modules() if type(m).__name__.endswith(("Block", "DecoderLayer")))
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config


def test_attaching_twice_is_refused() -> None:
    """A model has the nodes of one PCModel at a time; detaching frees it."""
    model = make("gpt2")
    pc = PCModel(model, BACKPROP)
    with pytest.raises(ValueError, match="has PC nodes already"):
        PCModel(model, BACKPROP)
    pc.detach()
    PCModel(model, BACKPROP).detach()


def test_failure_in_a_sweep_leaves_the_model_whole() -> None:
    """An exception inside a forward pass leaves requires_grad, evaluation and the next step as they were."""
    model, inputs = make("gpt2"), batch()
    pc = PCModel(model, BACKPROP)
    with pytest.raises(IndexError):
        pc.relax(**{**inputs, "input_ids": inputs["input_ids"] + 100})
    assert all(p.requires_grad for p in model.parameters())
    assert pc.relaxation is None
    assert pc.relax(**inputs).relaxed_fraction == 0.0
