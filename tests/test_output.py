"""Output energies against torch.distributions, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    SegformerForSemanticSegmentation,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
)

from hf_pc import PCConfig, PCModel
from hf_pc.output import OUTPUTS, BernoulliOutput, CategoricalOutput, ClassifierOutput, GaussianOutput, Output


def test_values_are_negative_log_likelihoods() -> None:
    """Nats per sequence: -log p(labels) summed; the Gaussian's without its constant."""
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    classes = torch.randint(0, 5, (3, 4))
    found = CategoricalOutput().energy(logits, classes)
    torch.testing.assert_close(found, -Categorical(logits=logits).log_prob(classes).sum(1))
    bits = torch.randint(0, 2, (3, 4, 5)).double()
    found = BernoulliOutput().energy(logits, bits)
    torch.testing.assert_close(found, -Bernoulli(logits=logits).log_prob(bits).sum((1, 2)))
    values = torch.randn(3, 4, 5, dtype=torch.float64)
    constant = 20 * 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    found = GaussianOutput().energy(logits, values)
    torch.testing.assert_close(found, -Normal(logits, 1.0).log_prob(values).sum((1, 2)) - constant)


def test_ignored_labels_cost_nothing() -> None:
    """-100 is ignored by every output, as everywhere in transformers."""
    logits = torch.randn(2, 3, 4)
    for output, labels in ((CategoricalOutput(), torch.ones(2, 3).long()), (GaussianOutput(), torch.ones(2, 3, 4)),
                           (BernoulliOutput(), torch.ones(2, 3, 4))):  # fmt: skip
        labels[:, 1:] = -100
        kept = output.energy(logits[:, :1], labels[:, :1])
        torch.testing.assert_close(output.energy(logits, labels), kept)


class Demanding(GPT2LMHeadModel):
    """A forward of a user's own, which is to be given labels."""

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:  # type: ignore[override]
        assert labels is not None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_a_forward_that_demands_labels_is_given_them() -> None:
    """It relaxes and learns as one that does not."""
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    reports = []
    for kind in (GPT2LMHeadModel, Demanding):
        torch.manual_seed(0)
        pc = PCModel(kind(config).eval(), PCConfig(sweeps=3, relative_std=0.2))
        reports.append(pc.accumulate_grad(input_ids=ids, attention_mask=mask, labels=ids).free_energy)
    assert reports[0] == reports[1]


def test_a_forward_without_named_outputs_is_refused() -> None:
    """A tuple or a tensor does not say which part of it labels are compared with."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    ids = torch.randint(0, 50, (2, 6))
    whole = model.forward
    for name, part in (("tuple", lambda **inputs: whole(**inputs).to_tuple()),
                       ("Tensor", lambda **inputs: whole(**inputs).logits)):  # fmt: skip
        model.forward = part
        with pytest.raises(ValueError, match=f"the model's forward returns a {name}: a dictionary with"):
            PCModel(model).relax(input_ids=ids, labels=ids)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("categorical", torch.tensor([[0, 5]]), "label 5 is out of range: 0 to 3 or -100"),
        ("categorical", torch.tensor([[0, -7]]), "label -7 is out of range"),
        ("categorical", torch.tensor([[0.5, 1.0]]), "no class indices"),
        ("bernoulli", torch.full((1, 2, 4), 1.5), "label 1.5 is outside"),
        ("bernoulli", torch.full((1, 2, 4), torch.nan), "label nan is outside"),
        ("gaussian", torch.zeros(1, 2, 3), "do not fit logits"),
    ],
)
def test_wrong_labels_are_named(name: str, labels: torch.Tensor, message: str) -> None:
    """Labels that this output cannot have raise an error with their value."""
    output = OUTPUTS[name]()
    with pytest.raises(ValueError, match=message):
        output.total({"logits": torch.zeros(1, 2, 4)}, output.split({"labels": labels})[1])


def test_a_number_that_a_class_would_not_ignore_is_named() -> None:
    """A regression's own loss takes -100 for a number: only where the output is named is it ignored."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**tiny, vocab_size=8, num_labels=1))
    inputs = {"labels": torch.tensor([1.0, -100.0])}
    with pytest.raises(ValueError, match=r"a label is -100, .* say PCConfig.output='gaussian', if not shift or scale"):
        Output.of(model).split(inputs)
    assert Output.of(model, "gaussian").split(inputs)[1].tolist() == [1.0, -100.0]


def test_the_output_follows_the_model() -> None:
    """ "auto" is what the model's own loss does: shifted for a causal model, by problem_type for a classifier."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8))
    assert Output.of(gpt2) == CategoricalOutput(shifted=True)
    several = {"num_labels": 3, "problem_type": "multi_label_classification"}
    for settings, kind in (({"num_labels": 3}, ClassifierOutput), ({"num_labels": 1}, GaussianOutput),
                           (several, BernoulliOutput)):  # fmt: skip
        model = BertForSequenceClassification(BertConfig(**tiny, vocab_size=8, **settings))
        assert type(Output.of(model)) is kind


def test_a_classifier_is_what_its_labels_say() -> None:
    """Without a problem_type class indices are one of several classes and numbers several yes or no, of which -100 is
    none that transformers' own loss ignores; drawn labels are of the same kind."""
    logits = torch.randn(5, 3, dtype=torch.float64)
    output = ClassifierOutput(chosen=True)
    for kind, labels in (
        (CategoricalOutput(), torch.tensor([0, 2, 1, -100, 0])),
        (BernoulliOutput(), torch.eye(5, 3)),
    ):
        _, aligned = output.split({"labels": labels})
        assert torch.equal(output.total({"logits": logits}, aligned), kind.total({"logits": logits}, aligned))
        drawn = output.draw(logits, aligned)
        assert drawn.shape == labels.shape
        assert drawn.is_floating_point() == labels.is_floating_point()
    with pytest.raises(ValueError, match="a label is -100"):
        output.split({"labels": torch.tensor([[0.0, 1.0, -100.0]])})
    with pytest.raises(ValueError, match=r"labels of shape \(5, 2\) do not fit .* of dtype torch.float32 are numb"):
        output.total({"logits": logits}, torch.zeros(5, 2))


def test_only_what_asks_its_labels_is_such_a_classifier() -> None:
    """A class whose own loss is the cross-entropy whatever the labels refuses numbers; so does one of tokens. What the
    labels are is written into the configuration, as transformers does."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sound = Wav2Vec2Config(**tiny, conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_labels=3,
                           num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)  # fmt: skip
    bert = BertConfig(**tiny, vocab_size=8, num_labels=3)
    llama = LlamaConfig(**tiny, vocab_size=8, num_labels=3, pad_token_id=0)
    fixed = [Wav2Vec2ForSequenceClassification(sound), BertForTokenClassification(bert)]
    for model in fixed:
        with pytest.raises(ValueError, match="are no class indices"):
            Output.of(model).split({"labels": torch.eye(2, 3)})
    for model in (BertForSequenceClassification(bert), LlamaForSequenceClassification(llama)):
        pc = PCModel(model, PCConfig(sweeps=1))
        assert type(pc.output) is ClassifierOutput
        pc.relax(input_ids=torch.ones(2, 4).long(), labels=torch.eye(2, 3))
        assert model.config.problem_type == "multi_label_classification"


def test_labels_that_do_not_fit() -> None:
    """Labels that are no tensor, of another shape than the logits, or no numbers, are errors that say so."""
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="labels of type list are not supported: a tensor is needed"):
        CategoricalOutput().split({"labels": [1, 2]})
    with pytest.raises(
        ValueError, match=r"labels of shape \(2, 2\) do not fit logits of shape \(2, 3, 4\): one class"
    ):
        CategoricalOutput().total({"logits": logits}, torch.zeros(2, 2).long())
    with pytest.raises(
        ValueError, match=r"labels of shape \(2, 3\) do not fit logits of shape \(2, 3, 4\): one number"
    ):
        GaussianOutput().total({"logits": logits}, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="labels that are not finite are not allowed"):
        GaussianOutput().convert(torch.tensor([torch.inf]))
    assert GaussianOutput().energy(torch.ones(2, 1), torch.zeros(2)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [(Wav2Vec2ForCTC, "ForCTCLoss"), (SegformerForSemanticSegmentation, "ForSemanticSegmentationLoss")],
)
def test_losses_that_no_output_stands_for(kind: Any, loss: str) -> None:
    """A loss that is no sum over labels is refused by name, before anything is tried; another output may be named."""
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(ValueError, match=f"{kind.__name__} learns by {loss}, which is no sum over labels"):
        Output.of(model)
    assert isinstance(Output.of(model, "gaussian"), GaussianOutput)
