"""What the examples of one task each share: how they start and end, their common flags and defaults, the accuracy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_pc import PCConfig, PCTrainingArguments

#: a small encoder without dropout, so that both sides see the same function
SMALL_ENCODER = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128,
}  # fmt: skip


@dataclass
class CommonArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint to start from."})
    compare_bp: bool = field(default=True, metadata={"help": "Train by backprop too, from the same start."})


@dataclass
class TaskTrainingArguments(PCTrainingArguments):
    output_dir: str = field(default="runs/task", metadata={"help": "Where everything goes."})
    max_steps: int = 200
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 20
    do_train: bool = field(default=True, metadata={"help": "Train; --do_train false only evaluates."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate."})
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 50
    save_strategy: str = "no"
    use_cpu: bool = not torch.cuda.is_available()
    resume_from_checkpoint: str | None = None


def launch(main: Callable[[], Any]) -> None:
    """Run a script: what the user got wrong is one line, and the process group is left in order."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    PartialState().destroy_process_group()  # left to the interpreter's exit, it may abort it


def parse(kinds: tuple[Any, ...], argv: list[str] | None, **defaults: Any) -> tuple[Any, ...]:
    """The given dataclasses, the last a kind of TrainingArguments, and a PCConfig; sets the seed.

    Args:
        argv: None takes the command line's.
        defaults: of this example, where they differ from the dataclasses'.
    """
    parser = HfArgumentParser((*kinds, PCConfig))
    parser.set_defaults(**defaults)
    parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    set_seed(parsed[-2].seed)
    return parsed


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise ValueError, naming the flag, if a number is too small; None is no number."""
    if value is not None and value < least:
        raise ValueError(f"--{name} {value} is too small: at least {least} is needed")


def first(data: Dataset, count: int | None) -> Dataset:
    """The first `count` rows, or all."""
    return data if count is None else data.select(range(min(count, len(data))))


def class_labels(names: list[str]) -> dict[str, Any]:
    """The classes, as a configuration of transformers takes them."""
    return {"num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)}}  # fmt: skip


def accuracy(found: EvalPrediction) -> dict[str, float]:
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}
