"""`hf_pc.padding`: that what a batch is padded with changes nothing, whatever says that it is padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from test_invariants import gradients, make, worst
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from hf_pc import PCConfig, PCModel
from hf_pc.energies import ENERGIES
from hf_pc.node import Node, Site, Strength
from hf_pc.padding import Padding
from hf_pc.relaxation import Relaxation

SIZES: dict[str, Any] = {"vocab_size": 20, "d_model": 16, "pad_token_id": 1, "decoder_start_token_id": 2}
#: what a batch is padded with
FILL = {"labels": -100, "input_ids": 1, "attention_mask": 0, "decoder_attention_mask": 0}


@pytest.mark.parametrize(
    ("shape", "logits", "masked"),
    [((2, 4, 3), False, True), ((2, 4), False, False), ((2, 5, 3), False, False), ((2, 4, 3, 5), False, True),
     ((8, 3), False, True), ((2, 3, 4, 6), True, True), ((2, 3, 4, 6), False, False), ((2, 4, 3, 5), True, False)],
)  # fmt: skip
def test_padding_is_found_in_states_of_its_own_shape(shape: tuple[int, ...], logits: bool, masked: bool) -> None:
    """[batch, sequence, ...], [batch * sequence, width], and logits of attention, [batch, heads, queries, keys]; no
    other states hold any."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    strength = Strength(1.0, 1.0, {})
    relaxation = Relaxation(2, mask.sum(), strength, lambda relaxation, site, mu: mu)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    site = Site(Node("n", nn.Identity(), ENERGIES["gaussian"](), in_nats=logits), "n", values, strength, 2)
    for given, holds in ((torch.ones(2, 4), False), (mask[:, None, None], False), (None, False), (mask, masked)):
        batch = {} if given is None else {"attention_mask": given}
        relaxation.padding = Padding.of(nn.Identity(), batch, mask)
        expected = values.clone()
        if holds and len(shape) == 2:
            expected[6:] = 0
        elif holds:
            (expected[1].transpose(0, 1) if logits else expected[1])[2:] = 0
        assert torch.equal(relaxation.without_padding(site, values), expected)


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**SIZES, **sizes))


def bart() -> nn.Module:
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 2))}  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**SIZES, **sides, max_position_embeddings=32, dropout=0.0))


def prompted() -> nn.Module:
    """A GPT-2 with virtual tokens before each sequence."""
    settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    return get_peft_model(make("gpt2"), settings)  # type: ignore[no-any-return]


def pairs() -> dict[str, Tensor]:
    """One sequence, and others to say."""
    ids, said = torch.arange(3, 9)[None], torch.arange(5, 10)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": said}


def told() -> dict[str, Tensor]:
    """The same with a mask for the decoder."""
    return pairs() | {"decoder_attention_mask": torch.ones(1, 5, dtype=torch.long)}


def own() -> dict[str, Tensor]:
    """One sequence to predict."""
    ids = torch.arange(3, 9)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("solver", ["error", "state"])
@pytest.mark.parametrize(("build", "batch"), [(t5, pairs), (t5, told), (bart, pairs), (prompted, own)])
def test_padding_changes_no_gradient(build: Callable[[], nn.Module], batch: Callable[[], Any], solver: str) -> None:
    """Of what encoder and decoder read, and behind virtual tokens, in the second step, when activities are known."""
    found = []
    for width in (0, 4):
        set_seed(0)
        model = build().double().eval()
        pc = PCModel(model, PCConfig(solver=solver, sweeps=8, relative_std=0.5))
        inputs = {name: F.pad(values, (0, width), value=FILL[name]) for name, values in batch().items()}
        for _ in range(2):
            model.zero_grad()
            pc.accumulate_grad(**inputs)
            pc.steer()
        found.append(gradients(model))
    assert worst(*found) < 1e-8


def test_padding_of_choices_changes_no_gradient() -> None:
    """A mask for each of several choices is one for each row of states."""
    found = []
    for width in (0, 4):
        set_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForMultipleChoice(BertConfig(vocab_size=20, **sizes, **dropout)).double()
        pc = PCModel(model, PCConfig(sweeps=6, relative_std=0.5))
        ids = torch.arange(3, 15).view(1, 2, 6)
        inputs = {"input_ids": F.pad(ids, (0, width)), "attention_mask": F.pad(torch.ones_like(ids), (0, width))}
        for _ in range(2):
            model.zero_grad()
            pc.accumulate_grad(**inputs, labels=torch.tensor([1]))
            pc.steer()
        found.append(gradients(model))
    assert worst(*found) < 1e-8
