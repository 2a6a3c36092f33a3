"""What is learned is what the model's own loss is of, or a run says that it is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, get_peft_model
from test_invariants import batch, make
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
    set_seed,
)

from hf_pc import PCConfig, PCModel, PCTrainer, PCTrainingArguments
from hf_pc.output import Output
from hf_pc.own_loss import difference

BERT = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "use_cache": False,
}
EXPERTS = {"num_experts": 2, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "decoder_start_token_id": 1}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}


class Named(GPT2LMHeadModel):
    """A user's own class of a causal language model."""


class Weighted(BertForSequenceClassification):
    """One whose own loss weighs classes."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        if labels is not None:
            found.loss = F.cross_entropy(found.logits, labels, weight=torch.tensor([10.0, 1.0, 0.1]))
        return found


class Shifting(BertForMaskedLM):
    """One that predicts the next token, which its class does not tell."""

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> Any:
        found = super().forward(**inputs)
        if labels is not None:
            found.loss = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return found


def classes(kind: type = BertForSequenceClassification, **settings: Any) -> Any:
    return kind(BertConfig(**BERT, **{"num_labels": 3, **settings}))


TEXT = {"input_ids": batch()["input_ids"], "labels": batch()["input_ids"]}
ONE_OF_THREE = {"input_ids": batch()["input_ids"], "labels": torch.arange(len(batch()["input_ids"])) % 3}
NUMBERS = ONE_OF_THREE | {"labels": ONE_OF_THREE["labels"].float()}
BITS = ONE_OF_THREE | {"labels": F.one_hot(ONE_OF_THREE["labels"], 3).float()}

SAME: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "gpt2": (lambda: make("gpt2"), TEXT),
    "a subclass": (lambda: Named(make("gpt2").config), TEXT),
    "prompt tuning": (
        lambda: get_peft_model(make("gpt2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), TEXT
    ),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, output_router_logits=True,
                                                 router_aux_loss_coef=0.3)), TEXT
    ),
    "nllb_moe": (
        lambda: NllbMoeForConditionalGeneration(NllbMoeConfig(**BART, **EXPERTS, output_router_logits=True)), TEXT
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=2,
                                                    num_heads=2, decoder_start_token_id=0)), TEXT
    ),
    "bart decoder": (lambda: BartForCausalLM(BartConfig(**BART)), TEXT),
    "trocr decoder": (
        lambda: TrOCRForCausalLM(TrOCRConfig(vocab_size=50, d_model=16, decoder_layers=2, decoder_attention_heads=2,
                                             decoder_ffn_dim=32, use_cache=False)), TEXT
    ),
    "xlnet": (lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32)), TEXT),
    "xlm": (lambda: XLMWithLMHeadModel(XLMConfig(vocab_size=50, emb_dim=16, n_layers=2, n_heads=2)), TEXT),
    "masked": (lambda: classes(BertForMaskedLM), TEXT),
    "classes": (classes, ONE_OF_THREE),
    "regression": (lambda: classes(num_labels=1), NUMBERS),
    "several labels": (lambda: classes(problem_type="multi_label_classification"), BITS),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_energy_is_the_own_loss(name: str) -> None:
    """Of each kind of head: nothing is said, and one sweep's gradient is that of the model's own loss (of half of it,
    of a regression)."""
    make_model, inputs = SAME[name]
    set_seed(0)
    model = make_model().eval()
    assert difference(model, inputs, Output.of(model)) is None
    pc = PCModel(model, PCConfig(sweeps=1))
    pc.accumulate_grad(**inputs)
    pc.detach()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs).loss.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == own.keys()
    factor = 0.5 if name == "regression" else 1.0
    for key, gradient in own.items():
        torch.testing.assert_close(found[key], factor * gradient, rtol=1e-3, atol=1e-6)


def trained(model: Any, inputs: dict[str, Tensor], folder: Path) -> None:
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["input_ids"]))]
    args = PCTrainingArguments(str(folder), max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                               remove_unused_columns=False)  # fmt: skip
    PCTrainer(model=model, args=args, train_dataset=rows).train()  # type: ignore[arg-type]


def test_another_alignment_ends_the_run(tmp_path: Path) -> None:
    """A class that does not tell how it aligns labels is refused, with what to set; set so, it is none."""
    set_seed(0)
    model = classes(Shifting)
    with pytest.raises(ValueError, match=r"Shifting computes its loss from labels shifted by one.*'ForCausalLM'"):
        trained(model, TEXT, tmp_path)
    model.loss_type = "ForCausalLM"
    assert difference(model, TEXT, Output.of(model)) is None
    causal = make("gpt2")
    causal.loss_function = lambda logits, labels, **rest: F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    with pytest.raises(ValueError, match=r"from labels as they are.*'ForMaskedLM'"):
        trained(causal, TEXT, tmp_path)


def test_a_loss_of_its_own_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run says once that it learns from the output energy; the random state is what it was."""
    set_seed(0)
    model = classes(Weighted)
    before = torch.get_rng_state()
    found = difference(model, ONE_OF_THREE, Output.of(model))
    assert found is not None
    assert not found.other_task
    assert torch.equal(torch.get_rng_state(), before)
    with caplog.at_level(logging.WARNING, "hf_pc"):
        trained(model, ONE_OF_THREE, tmp_path)
    assert caplog.text.count("is not followed") == 1
