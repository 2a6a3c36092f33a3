"""`hf_pc.padding`: that what a batch is padded with changes nothing, whatever says that it is padding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
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
from hf_pc.padding import Padding, encoder_of
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


@pytest.mark.parametrize(("build", "count"), [(t5, 4), (bart, 4)])
def test_keys_of_what_the_encoder_read_have_its_padding(build: Callable[[], nn.Module], count: int) -> None:
    """Two maps of each of two decoder blocks, though source and target be of one length."""
    model = build()
    encoder = encoder_of(model)
    own = set(model.get_encoder().modules())  # type: ignore[operator]
    across = {name for name, module in model.named_modules() if module in encoder and module not in own}
    assert len(across) == count
    ids = torch.arange(3, 9)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": F.pad(ids[:, :4], (0, 2), value=-100),
    }
    pc = PCModel(model, PCConfig(nodes="linear", sweeps=2, relative_std=0.5))
    with pc.relaxed(inputs) as relaxation:
        (pc.learning_pass(inputs)[0] / relaxation.tokens).backward()
        for site in relaxation.sites:
            real = relaxation.padding.at(site)
            assert (real is None) == (site.node.module in encoder)
            if real is not None:
                assert real[0, :, 0].tolist() == [True] * 4 + [False] * 2


def test_a_decoder_of_an_unknown_encoder_is_given_no_mask_of_it() -> None:
    """What the mask is of cannot be told: nothing is taken for padding."""

    class Own(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True)

    mask = torch.tensor([[1, 1, 0, 0]])
    site = Site(Node("n", nn.Identity(), ENERGIES["gaussian"]()), "n", torch.zeros(1, 4, 2), Strength(1.0, 1.0, {}), 1)
    assert Padding.of(Own(), {"attention_mask": mask}, mask).at(site) is None
    assert Padding.of(nn.Identity(), {"attention_mask": mask}, mask).at(site) is not None


def real(model: nn.Module, width: int, positions: int, **inputs: Tensor) -> list[bool] | None:
    """Which positions of the one sequence of a batch are real, at a node of a decoder."""
    states = torch.zeros(1, positions, width)
    site = Site(Node("n", nn.Identity(), ENERGIES["gaussian"]()), "n", states, Strength(1.0, 1.0, {}), 1)
    found = Padding.of(model, inputs, inputs["labels"], encoder_of(model)).at(site)
    return None if found is None else found[0, :, 0].tolist()


def test_what_says_that_a_position_is_real() -> None:
    """A decoder's own mask before its labels, of which the last one counts; before a sequence an adapter's tokens."""
    labels = torch.tensor([[-100, 7, -100, 8, -100]])
    assert real(t5(), 4, 5, labels=labels) == [True] * 4 + [False]
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    assert real(t5(), 4, 5, labels=labels, decoder_attention_mask=mask) == [True] * 2 + [False] * 3
    assert real(prompted(), 4, 8, labels=labels, attention_mask=mask) == [True] * 5 + [False] * 3
    assert real(prompted(), 4, 8, labels=labels) is None


def test_an_encoder_is_looked_for_where_there_is_one() -> None:
    """Not in a decoder alone, nor in a class of one's own that has none to name."""

    class Own(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True)

    assert not encoder_of(make("gpt2"))
    assert not encoder_of(Own())
