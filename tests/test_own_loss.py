"""What is learned is what the model's own loss is of, or a run says that it is not."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
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
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
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
from hf_pc.own_loss import NO_LABELS, NOT_COMPARED, OTHER_LOSS, SAME, compare_with_own_loss
from hf_pc.trainer import BackpropTrainer

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

ALIKE: dict[str, tuple[Any, dict[str, Tensor]]] = {
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
    "switch": (
        lambda: SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(
            vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2,
            num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
            router_z_loss_coef=0.5, router_aux_loss_coef=0.5, output_router_logits=True)), TEXT
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
    "several labels, not said": (classes, BITS),
    "several labels": (lambda: classes(problem_type="multi_label_classification"), BITS),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_the_energy_is_the_own_loss(name: str) -> None:
    """Of each kind of head: nothing is said, and one sweep's gradient is that of the model's own loss (of half of it,
    of a regression)."""
    make_model, inputs = ALIKE[name]
    set_seed(0)
    model = make_model().eval()
    assert compare_with_own_loss(model, inputs, Output.of(model)).verdict == SAME
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


def trained(model: Any, inputs: dict[str, Tensor], folder: Path, cls: Any = PCTrainer) -> Any:
    rows = [{key: value[i] for key, value in inputs.items()} for i in range(len(inputs["input_ids"]))]
    args = PCTrainingArguments(str(folder), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
                               remove_unused_columns=False, per_device_train_batch_size=2)  # fmt: skip
    run = cls(model=model, args=args, train_dataset=rows)
    run.train()
    return run


def as_they_are(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("cls", [PCTrainer, BackpropTrainer])
def test_another_alignment_ends_the_run(tmp_path: Path, cls: Any) -> None:
    """A class that does not tell how it aligns labels is refused, with what to set, as often as it is tried."""
    set_seed(0)
    model = classes(Shifting)
    said = r"Shifting computes its loss from labels shifted by one.*model.shifts_labels = True"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            trained(model, TEXT, tmp_path, cls)
    model.shifts_labels = True
    assert compare_with_own_loss(model, TEXT, Output.of(model)).verdict == SAME
    causal = make("gpt2")
    causal.loss_function = as_they_are
    run = cls(model=causal, args=PCTrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
              train_dataset=[{key: value[0] for key, value in TEXT.items()}])  # fmt: skip
    for _ in range(2):
        with pytest.raises(ValueError, match=r"from labels as they are.*shifts_labels = False"):
            run.train()


def test_what_is_told_of_an_adapted_model() -> None:
    """On the base model or on what wraps it."""
    for told in ("base", "wrapper"):
        model = get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn"], r=2))
        (model if told == "wrapper" else model.get_base_model()).shifts_labels = False
        assert not Output.of(model).shifted


def test_a_loss_of_its_own_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run says once that it learns from the output energy."""
    set_seed(0)
    model = classes(Weighted)
    assert compare_with_own_loss(model, ONE_OF_THREE, Output.of(model)).verdict == OTHER_LOSS
    with caplog.at_level(logging.WARNING, "hf_pc"):
        trained(model, ONE_OF_THREE, tmp_path)
    assert caplog.text.count("is not followed") == 1


class Doubling(GPT2LMHeadModel):
    """One that writes into what it is given."""

    def forward(self, inputs_embeds: Tensor | None = None, **inputs: Any) -> Any:
        assert inputs_embeds is not None
        return super().forward(inputs_embeds=inputs_embeds.mul_(2), **inputs)


def test_comparing_leaves_no_trace() -> None:
    """Inputs, modes and generators are what they were."""
    model = Doubling(make("gpt2").config).train()
    inputs = {"inputs_embeds": torch.ones(2, 8, 32), "labels": torch.ones(2, 8).long()}
    before = [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    assert compare_with_own_loss(model, inputs, Output.of(model)).verdict == SAME
    assert bool((inputs["inputs_embeds"] == 1).all())
    assert all(module.training for module in model.modules())
    assert before == [random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


def test_where_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """A batch without labels is not the one to judge by: a run waits for the next; a wrong one is for learning to
    name."""
    model = make("gpt2")
    output = Output.of(model)
    none = {"input_ids": TEXT["input_ids"], "labels": torch.full_like(TEXT["labels"], -100)}
    assert compare_with_own_loss(model, none, output).verdict == NO_LABELS
    wrong = {"input_ids": TEXT["input_ids"], "labels": torch.full_like(TEXT["labels"], 999)}
    assert compare_with_own_loss(model, wrong, output).verdict == NOT_COMPARED
    model.loss_function = as_they_are
    rows = [{key: value[0] for key, value in batch.items()} for batch in (none, TEXT)]
    args = PCTrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=1,
                               train_sampling_strategy="sequential", save_strategy="no")  # fmt: skip
    with pytest.raises(ValueError, match="from labels as they are"):
        PCTrainer(model=model, args=args, train_dataset=rows).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [SAME, NO_LABELS])
def test_comparing_changes_nothing_that_is_learned(tmp_path: Path, first: str) -> None:
    """Not where it waits for labels either: a run that compares ends with the weights of one that does not."""
    rows = [{key: value[i] for key, value in TEXT.items()} for i in range(2)]
    if first == NO_LABELS:
        rows[0]["labels"] = torch.full_like(rows[0]["labels"], -100)
    ends = []
    for compared in (True, False):
        args = PCTrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
                                   per_device_train_batch_size=1, train_sampling_strategy="sequential")  # fmt: skip
        model = make("gpt2", dropout=0.1)
        run = PCTrainer(model=model, args=args, train_dataset=rows, pc_config=PCConfig(relative_std=0.3))  # type: ignore[arg-type]
        run._compared = compared
        run.train()
        assert run._compared
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("compiles", [False, True])
def test_several_labels_that_no_configuration_names(tmp_path: Path, compiles: bool) -> None:
    """A classifier without a problem_type learns several labels from numbers; its loss in evaluation is the model's
    own, and as no class is predicted there is no perplexity."""
    set_seed(0)
    model = classes()
    assert model.config.problem_type is None
    rows = [{key: value[i] for key, value in BITS.items()} for i in range(len(BITS["input_ids"]))]
    args = PCTrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    run = PCTrainer(
        model=model, args=args, pc_config=PCConfig(compile=compiles), train_dataset=rows, eval_dataset=rows
    )
    run.train()
    found = run.evaluate()
    with torch.no_grad():
        own = model.eval()(**BITS).loss
    assert found["eval_loss"] == pytest.approx(float(own), rel=1e-5)
    assert "eval_perplexity" not in found


def test_a_comparison_that_fails_leaves_the_configuration() -> None:
    """Class indices of eight bits, which transformers' own loss takes for several labels, are class indices here, and
    what that loss wrote before it failed is taken back."""
    set_seed(0)
    model = classes()
    narrow = {**ONE_OF_THREE, "labels": ONE_OF_THREE["labels"].to(torch.uint8)}
    assert compare_with_own_loss(model, narrow, Output.of(model)).verdict == NOT_COMPARED
    assert model.config.problem_type is None
    wide = Output.of(model).split(ONE_OF_THREE)[1]
    assert torch.equal(Output.of(model).split(narrow)[1], wide)
