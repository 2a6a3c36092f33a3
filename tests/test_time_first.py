"""Modules whose states are [sequence, batch, features], and other habits of models that nodes have to follow."""

from __future__ import annotations

from typing import Any

import pytest
import test_invariants
import torch
from test_invariants import batch, make, worst
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    XLNetConfig,
    XLNetLMHeadModel,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.distributed import SplitPCModel


class Encoder(nn.Module):
    """Torch's own transformer, which has the sequence first unless it is told otherwise."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.embed, self.encoder, self.head = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        states = self.embed(input_ids)
        states = self.encoder(states if self.batch_first else states.transpose(0, 1))
        return {"logits": self.head(states if self.batch_first else states.transpose(0, 1))}


def gradients(model: nn.Module, ids: Tensor, config: PCConfig, at_once: bool) -> list[Tensor]:
    """Of a batch, or of its sequences one by one, in nats per label of the batch."""
    model.zero_grad()
    pc = PCModel(model, config)
    labels = int(pc.output.count(pc.output.split({"input_ids": ids, "labels": ids})[1]))
    for part in [ids] if at_once else ids.split(1):
        pc.accumulate_grad(input_ids=part, labels=part, num_items_in_batch=labels)
    pc.detach()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("solver", ["error", "state"])
@pytest.mark.parametrize("name", ["torch", "xlnet"])
def test_sequences_are_kept_apart(solver: str, name: str) -> None:
    """What a batch learns is what its sequences learn one by one, whichever dimension counts them."""
    size = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.0}
    torch.manual_seed(0)
    model: nn.Module = (Encoder(False) if name == "torch" else XLNetLMHeadModel(XLNetConfig(**size))).double()
    ids = torch.randint(0, 50, (4, 12))
    config = PCConfig(solver=solver, sweeps=6, precision=10.0)
    found, expected = (gradients(model, ids, config, at_once) for at_once in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nodes", ["block", "linear", [r"encoder\.layers\.\d+\.self_attn"]])
def test_what_is_inside_follows_what_is_around_it(nodes: Any) -> None:
    """Nodes inside such a block keep sequences apart too."""
    ids = torch.randint(0, 50, (4, 12))
    config = PCConfig(sweeps=6, precision=10.0, nodes=nodes)
    found, expected = (gradients(Encoder(False).double(), ids, config, at_once) for at_once in (True, False))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_such_blocks_are_not_split() -> None:
    """Between processes states have the batch first."""
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32))
    with pytest.raises(ValueError, match=r"XLNetLMHeadModel cannot be split: .*are \[sequence, batch, features\]"):
        SplitPCModel(model, PCConfig(solver="state"))


def test_the_order_of_dimensions_changes_nothing() -> None:
    """The same weights learn the same with the sequence first as with the batch first."""
    ids = torch.randint(0, 50, (4, 12))
    models = [Encoder(first).double() for first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    config = PCConfig(sweeps=4, relative_std=0.5)
    for one, other in zip(*(gradients(model, ids, config, True) for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class Own(nn.Module):
    """A block of the user's own, around an attention that has the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, states: Tensor) -> Any:
        return states + self.attention(states, states, states)[0]


def test_a_module_that_may_be_either_is_asked_for() -> None:
    """A block around such an attention has to say what comes first, where shapes look as if it were the sequence."""
    model = Encoder(False)
    model.encoder.layers = nn.ModuleList([Own(), Own()])
    model.encoder.forward = lambda states: model.encoder.layers[1](model.encoder.layers[0](states))
    ids = torch.randint(0, 50, (4, 12))
    with pytest.raises(ValueError, match=r"say whether its states are .* by an attribute time_first of the module"):
        gradients(model, ids, PCConfig(sweeps=2, precision=1.0), True)
    for layer in model.encoder.layers:
        layer.time_first = True
    model = model.double()
    config = PCConfig(sweeps=5, precision=10.0)
    for one, other in zip(*(gradients(model, ids, config, at_once) for at_once in (True, False)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", [{"solver": "state"}, {"learning": "balanced", "relaxed_fraction": 0.1}])
def test_weights_that_step_in_the_backward_pass(settings: dict[str, Any]) -> None:
    """They are refused where gradients come in parts; plain learning gives them whole ones."""
    model = make("gpt2")
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="a weight has a hook that runs once its gradient is accumulated"):
        PCModel(model, PCConfig(**settings)).accumulate_grad(**batch())
    assert PCModel(model, PCConfig(**settings)).relax(**batch()).sweeps > 1  # from which nothing learns
    model = make("gpt2")
    calls: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(calls.append)
    PCModel(model, PCConfig(sweeps=3, relative_std=0.2)).accumulate_grad(**batch())
    assert len(calls) == len(list(model.parameters()))


def test_a_cache_is_the_same_in_every_sweep() -> None:
    """A cache of keys among the inputs is left as it was, whatever number of passes writes to it."""
    model = make("gpt2").eval()
    given = batch()
    with torch.no_grad():
        cache = model(input_ids=given["input_ids"], use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    before = cache.get_seq_length()
    PCModel(model, PCConfig(sweeps=3, relative_std=0.2)).relax(
        input_ids=given["input_ids"][:, :4], labels=given["input_ids"][:, :4], past_key_values=cache, use_cache=True
    )
    assert cache.get_seq_length() == before


def test_lists_of_lists_are_no_blocks() -> None:
    """A preset takes the modules that run, not the lists that hold them."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            inner = lambda: nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])  # noqa: E731
            self.stages = nn.ModuleList([inner(), inner(), inner()])

        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            states = self.embed(input_ids)
            for stage in self.stages:
                for block in stage:
                    states = block(states)
            return {"logits": self.head(states)}

    pc = PCModel(Nested(), PCConfig(sweeps=2, relative_std=0.2))
    assert all(isinstance(node.module, nn.Sequential) for node in pc.nodes)
    ids = torch.randint(0, 50, (2, 6))
    assert pc.relax(input_ids=ids, labels=ids).sweeps == 2


@pytest.mark.parametrize("nodes", ["block", "sublayer"])
def test_streams_before_the_batch(nodes: str) -> None:
    """Gemma 3n's blocks return [streams, batch, sequence, features]: sequences are kept apart all the same, and at
    T = 1 weights learn as by backprop."""
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "hidden_size_per_layer_input": 8, "intermediate_size": 48,
                             "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
                             "head_dim": 16, "laurel_rank": 4, "sliding_window": 8}  # fmt: skip
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, num_kv_shared_layers=1, layer_types=kinds, pad_token_id=0,
        activation_sparsity_pattern=[0.0] * 3, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config).double().eval()
    ids = torch.randint(1, 64, (4, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    expected = test_invariants.gradients(model)
    model.zero_grad()
    pc = PCModel(model, PCConfig(nodes=nodes, sweeps=1))
    pc.accumulate_grad(input_ids=ids, labels=ids)
    assert worst(expected, test_invariants.gradients(model)) < 1e-6  # parts of it compute in float32
    pc.detach()
    pc = PCModel(model, PCConfig(nodes=nodes, sweeps=6, relative_std=0.5))
    together = pc.relax(input_ids=ids, labels=ids)
    assert together.refused < 0.1
    alone = [float(pc.relax(input_ids=row[None], labels=row[None]).sequence_free_energy) for row in ids]
    assert together.sequence_free_energy.tolist() == pytest.approx(alone, rel=1e-5)
