"""`PCTrainerMixin` with the trainers of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from test_invariants import gradients, worst
from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import SFTConfig, SFTTrainer

from hf_pc import PCConfig, PCModel, PCTrainerMixin, PCTrainingArguments


class PCSFTTrainer(PCTrainerMixin, SFTTrainer):
    """Supervised fine-tuning, whose loss is the cross-entropy of the completion."""

    compute_loss = PCTrainerMixin.compute_loss


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["what is it?"] * 3, vocab_size=270, special_tokens=["<e>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>", pad_token="<e>", bos_token="<e>")


def tuned(
    folder: Path, cls: Any, kind: Any = SFTConfig, curvature_steps: int | None = None, frozen: bool = False,
    **extra: Any,
) -> tuple[torch.Tensor, Any]:  # fmt: skip
    set_seed(0)
    given = tokenizer()
    sizes = {"vocab_size": len(given), "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))
    rows = [{"prompt": f"what is {i}?", "completion": f" it is {i * i}"} for i in range(32)]
    model.requires_grad_(not frozen)
    more = {} if curvature_steps is None else {"curvature_steps": curvature_steps}
    args = kind(
        output_dir=str(folder), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, learning_rate=0.1,
        per_device_train_batch_size=4, optim="sgd", save_strategy="no", disable_tqdm=True,
        bf16=False, **more,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    run = cls(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=given, **extra)
    run.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), run


@dataclass
class Both(PCTrainingArguments, SFTConfig):
    """What a PC run needs, and what TRL does."""


def test_arguments_of_both(tmp_path: Path) -> None:
    """A dataclass of both kinds of arguments is taken for TRL's, and its PC settings are followed."""
    given = {"pc_config": PCConfig(sweeps=2, relative_std=0.5), "curvature_steps": 2}
    _, run = tuned(tmp_path, PCSFTTrainer, kind=Both, **given)
    assert any("curvature" in entry for entry in run.state.log_history)


@pytest.mark.parametrize("nodes", [["base_model.model.transformer.h.0"], [r"transformer\.h\.\d+"], "block"])
def test_an_adapter_that_the_trainer_makes(tmp_path: Path, nodes: Any) -> None:
    """Nodes are looked for on what is trained, by names with PEFT's prefix or without it, as PEFT's own patterns; a
    base model that is frozen has an adapter to learn."""
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], init_lora_weights=False)
    config = PCConfig(nodes=nodes, sweeps=2, relative_std=0.5)
    _, run = tuned(tmp_path, PCSFTTrainer, frozen=True, peft_config=settings, pc_config=config)
    assert all(("lora" in name) == p.requires_grad for name, p in run.model.named_parameters())
    assert any(entry.get("relaxed_fraction", 0) > 0 for entry in run.state.log_history)


def test_supervised_fine_tuning(tmp_path: Path) -> None:
    """With TRL's SFTTrainer, T = 1 learns what it learns by itself: the completion alone; more sweeps relax."""
    expected, stock = tuned(tmp_path / "stock", SFTTrainer)
    found, run = tuned(tmp_path / "one", PCSFTTrainer, pc_config=PCConfig(sweeps=1))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-3)
    relaxed, run = tuned(tmp_path / "three", PCSFTTrainer, pc_config=PCConfig(sweeps=3, relative_std=0.5))
    assert not torch.equal(relaxed, found)
    assert any(entry.get("relaxed_fraction", 0) > 0 for entry in run.state.log_history)


def test_a_model_given_by_name(tmp_path: Path) -> None:
    """Such a trainer loads the model itself; it is checked once it is there."""
    sizes = {"vocab_size": 270, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    data = Dataset.from_list([{"prompt": f"what is {i}?", "completion": f" it is {i}"} for i in range(8)])
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, bf16=False,
                     save_strategy="no", disable_tqdm=True)  # fmt: skip
    given = {"model": str(tmp_path / "saved"), "args": args, "train_dataset": data}
    with pytest.raises(ValueError, match="nodes='nothing"):
        PCSFTTrainer(**given, pc_config=PCConfig(nodes="nothing.like.it"))
    run = PCSFTTrainer(**given, pc_config=PCConfig(sweeps=3, relative_std=0.5))
    run.train()
    assert run.pc is not None
    assert len(run.pc.nodes) == 2


def test_a_loss_of_whole_batches_is_refused(tmp_path: Path) -> None:
    """sentence-transformers' losses call the model themselves, once per column: an error by name, and no folder."""

    class PCSentenceTrainer(PCTrainerMixin, SentenceTransformerTrainer):
        pass

    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    with pytest.raises(ValueError, match=r"BaseTrainer\.compute_loss is not supported"):
        PCSentenceTrainer(
            model=model, args=SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "none"), report_to=[]),
            loss=CosineSimilarityLoss(model), pc_config=PCConfig(),
        )  # fmt: skip
    assert not (tmp_path / "none").exists()


class Pairs(torch.nn.Module):
    """The cosine of two sentences, from one encoder: a loss per pair, as CosineSimilarityLoss is, has an energy."""

    def __init__(self, encoder: SentenceTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, first: torch.Tensor, second: torch.Tensor, labels: Any = None) -> SequenceClassifierOutput:
        embeddings = [
            self.encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
            for ids in (first, second)
        ]
        return SequenceClassifierOutput(logits=torch.cosine_similarity(*embeddings))


def test_a_sentence_encoder_learns_pairs(tmp_path: Path) -> None:
    """A SentenceTransformer learns from labelled pairs: at T = 1 half the gradient of the mean squared error."""
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=270, **sizes, **drops)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    model = Pairs(encoder).double()
    ids = torch.randint(1, 250, (2, 4, 6))
    inputs = {"first": ids[0], "second": ids[1], "labels": torch.rand(4, dtype=torch.float64)}
    torch.nn.functional.mse_loss(model(**inputs).logits, inputs["labels"]).backward()
    expected = gradients(model)
    model.zero_grad()
    pc = PCModel(model, PCConfig(sweeps=1, output="gaussian"))
    pc.accumulate_grad(**inputs)
    assert worst({name: 2 * value for name, value in gradients(model).items()}, expected) < 1e-6
    pc.detach()
    found = PCModel(model, PCConfig(sweeps=20, output="gaussian", relative_std=0.3)).relax(**inputs)
    assert found.residual < 1e-4
    assert len(found.errors) == 4  # two blocks, each run on both sentences
