"""`PCTrainerMixin` with the trainers of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from hf_pc import PCConfig, PCTrainerMixin


class PCSFTTrainer(PCTrainerMixin, SFTTrainer):
    """Supervised fine-tuning, whose loss is the cross-entropy of the completion."""

    compute_loss = PCTrainerMixin.compute_loss


def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["what is it?"] * 3, vocab_size=270, special_tokens=["<e>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>", pad_token="<e>", bos_token="<e>")


def tuned(folder: Path, cls: Any, **extra: Any) -> tuple[torch.Tensor, Any]:
    set_seed(0)
    given = tokenizer()
    sizes = {"vocab_size": len(given), "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))
    rows = [{"prompt": f"what is {i}?", "completion": f" it is {i * i}"} for i in range(32)]
    args = SFTConfig(
        output_dir=str(folder), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, learning_rate=0.1,
        per_device_train_batch_size=4, optim="sgd", save_strategy="no", disable_tqdm=True,
        bf16=False,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    run = cls(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=given, **extra)
    run.train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), run


def test_supervised_fine_tuning(tmp_path: Path) -> None:
    """With TRL's SFTTrainer, T = 1 learns what it learns by itself: the completion alone; more sweeps relax."""
    expected, stock = tuned(tmp_path / "stock", SFTTrainer)
    found, run = tuned(tmp_path / "one", PCSFTTrainer, pc_config=PCConfig(sweeps=1))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert run.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], rel=1e-3)
    relaxed, run = tuned(tmp_path / "three", PCSFTTrainer, pc_config=PCConfig(sweeps=3, relative_std=0.5))
    assert not torch.equal(relaxed, found)
    assert any(entry.get("relaxed_fraction", 0) > 0 for entry in run.state.log_history)


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
