"""What several processes cannot do yet is an error before training that names the setting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from test_invariants import make
from test_trainer import RELAXING, trainer
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

from hf_pc import PCConfig, PCTrainer, PCTrainingArguments
from hf_pc.refusals import check_first_batch, check_targets, refuse


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed=.* is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM=true is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp version 1 is not supported.*--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp version 1 is not supported"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
         "PARALLELISM_CONFIG_TP_SIZE=2 is not supported: tensor parallelism"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend INDUCTOR"),
    ],
)  # fmt: skip
def test_what_a_launcher_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    """DeepSpeed, Megatron-LM, FSDP1, tensor parallelism and compilation, set by `accelerate launch`."""
    args = PCTrainingArguments(str(tmp_path), use_cpu=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        refuse(args, RELAXING, make("gpt2"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deepspeed": "zero.json"}, "deepspeed='zero.json' is not supported"),
        ({"parallelism_config": SimpleNamespace(tp_size=2)}, r"parallelism_config\.tp_size=2.*tensor parallelism"),
        ({"parallelism_config": SimpleNamespace(cp_size=2)}, r"parallelism_config\.cp_size=2.*context parallelism"),
        ({"parallelism_config": SimpleNamespace(sp_size=2)}, r"parallelism_config\.sp_size=2.*sequence parallelism"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use {'use_reentrant': False}",
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
            "use {'use_reentrant': False}",
        ),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 1}}, "fsdp version 1 is not supported"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}, "fsdp=True on the CPU is not supported"),
    ],
)
def test_what_the_arguments_ask_for(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """The same as fields of TrainingArguments; and FSDP2 on the CPU, which Accelerate would leave out unsaid."""
    args = PCTrainingArguments(str(tmp_path), use_cpu=True)
    for name, value in settings.items():
        setattr(args, name, value)
    args.distributed_state = SimpleNamespace(  # type: ignore[assignment]
        distributed_type=DistributedType.MULTI_CPU, num_processes=2
    )
    with pytest.raises(ValueError, match=message):
        refuse(args, PCConfig(), None)


def test_a_model_that_was_split_when_loaded(tmp_path: Path) -> None:
    """Tensor parallelism of transformers' own `distributed_config` is refused by the Trainer too."""
    model = make("gpt2")
    model.config.distributed_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ValueError, match=r"distributed_config\.tp_size=2 is not supported: tensor parallelism"):
        trainer(tmp_path / "none", model=model)
    assert not (tmp_path / "none").exists()


def test_a_model_that_checkpoints_reentrantly(tmp_path: Path) -> None:
    """What was switched on at the model is refused as what the arguments ask for; the other way trains."""
    for reentrant in (True, False):
        model = make("gpt2")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            with pytest.raises(ValueError, match=r"gradient_checkpointing_kwargs=.*True.* is not supported"):
                trainer(tmp_path / "none", model=model)
        else:
            trainer(tmp_path / "some", model=model, max_steps=1).train()
    assert not (tmp_path / "none").exists()


def test_classes_that_learn_from_other_targets(tmp_path: Path) -> None:
    """Spans of an answer are no labels: that is said before anything is made."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=8, **sizes))
    with pytest.raises(ValueError, match="BertForQuestionAnswering learns from start_positions, end_positions; what"):
        PCTrainer(model=model, args=PCTrainingArguments(str(tmp_path / "none"), use_cpu=True))
    assert not (tmp_path / "none").exists()

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, label_mask: torch.Tensor) -> torch.Tensor:
            return x * label_mask

    check_targets(Masked())  # a mask is no target


def test_no_dropout_and_checkpointing(tmp_path: Path) -> None:
    """transformers checkpoints in training mode alone: said before anything is made."""
    with pytest.raises(ValueError, match=r"dropout='off' does without training mode"):
        trainer(tmp_path / "none", PCConfig(dropout="off"), gradient_checkpointing=True)
    assert not (tmp_path / "none").exists()


def test_weights_that_move_at_every_sweep(tmp_path: Path) -> None:
    """They move within a batch: accumulation, a gradient scaler and the curvature of a batch are refused."""
    config = PCConfig(solver="state", weight_update="every_sweep")
    for name, value, message in (
        ("gradient_accumulation_steps", 2, "it takes gradient_accumulation_steps=1 and no fp16"),
        ("fp16", True, "it takes gradient_accumulation_steps=1 and no fp16"),
        ("curvature_steps", 5, "curvature_steps=5 cannot be had with weight_update='every_sweep'"),
    ):
        args = PCTrainingArguments(str(tmp_path), use_cpu=True)
        setattr(args, name, value)
        with pytest.raises(ValueError, match=message):
            refuse(args, config, None)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"fp16": True}])
def test_two_kinds_of_lower_precision(tmp_path: Path, settings: dict[str, bool]) -> None:
    """Where the learning pass is in mixed precision too, `relaxation_dtype` says nothing more: one of the two."""
    args = PCTrainingArguments(str(tmp_path), use_cpu=True)
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match="relaxation_dtype='bfloat16' is not allowed with bf16, fp16"):
        refuse(args, PCConfig(relaxation_dtype="bfloat16"), None)


def test_a_process_without_a_sequence_is_refused() -> None:
    """An iterable data set of fewer rows than processes leaves one an empty first batch, known when it comes."""
    check_first_batch({"labels": torch.zeros(1, 4), "scale": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="the first batch has no sequence for process 0: train_dataset needs"):
        check_first_batch({"labels": torch.zeros(0, 4)})


@pytest.mark.parametrize("settings", [{"selective": True}, {"selective": False, "every_n_layers": 2}])
def test_checkpointing_that_is_chosen_elsewhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    """TRL's own setting says what is kept, and means checkpointing that is not reentrant."""
    args = PCTrainingArguments(
        str(tmp_path), use_cpu=True, gradient_checkpointing=True, gradient_checkpointing_kwargs=settings
    )
    refuse(args, PCConfig(), None)
