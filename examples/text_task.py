"""What the text classification examples share: the data, the tokenizer, the model, the accuracy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clm_data import DataArguments, load_text, train_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict
from standard_library import functions
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
)

from hf_pc import PCTrainingArguments

#: a small encoder without dropout, so that both sides see the same function
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
         "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}  # fmt: skip


@dataclass
class TextArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint to start from."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines or CSV with 'text' and 'label'; default: which package a docstring is from."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same; default: every tenth row."})
    max_seq_length: int = 48
    max_train_samples: int | None = None
    classes: int = field(default=6, metadata={"help": "Packages to tell apart, where there is no train_file."})
    compare_bp: bool = field(default=True, metadata={"help": "Train by backprop too, from the same start."})

    def __post_init__(self) -> None:
        DataArguments(train_file=self.train_file, validation_file=self.validation_file)  # complains of bad files
        if self.classes < 2:
            raise ValueError(f"--classes {self.classes} is not allowed: at least 2 are needed")


@dataclass
class TaskTrainingArguments(PCTrainingArguments):
    output_dir: str = field(default="runs/classification", metadata={"help": "Where everything goes."})
    max_steps: int = 200
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 20
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 50
    save_strategy: str = "no"
    use_cpu: bool = not torch.cuda.is_available()
    resume_from_checkpoint: str | None = None


def load(args: TextArguments) -> DatasetDict:
    """Splits "train" and "validation" with "text" and an integer "label".

    Raises:
        ValueError: a column is missing.
    """
    if args.train_file is None:
        data = DatasetDict(train=docstrings(args.classes))
    else:
        data = load_text(DataArguments(train_file=args.train_file, validation_file=args.validation_file), None, None)
        columns = data["train"].column_names
        if not {"text", "label"} <= set(columns):
            raise ValueError(f"--train_file {args.train_file} has the columns {columns}: 'text', 'label' are needed")
        data = DatasetDict({name: split.class_encode_column("label") for name, split in data.items()})
    if args.train_file is None or args.validation_file is None:
        whole = data["train"]
        held_out = range(0, len(whole), 10)
        rest = sorted(set(range(len(whole))) - set(held_out))
        data = DatasetDict(train=whole.select(rest), validation=whole.select(held_out))
    if args.max_train_samples:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
    return data


def docstrings(classes: int) -> Dataset:
    """The first lines of docstrings of the packages that have most; the task is to tell which package it is."""
    found = sorted({(f.line, f.package) for f in functions() if len(f.line) > 20})
    names = [name for name, _ in Counter(package for _, package in found).most_common(classes)]
    rows = [(line, names.index(package)) for line, package in found if package in names]
    data = Dataset.from_dict({"text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    return data.cast_column("label", ClassLabel(names=names)).shuffle(seed=0)


def tokenizer_of(args: TextArguments, data: DatasetDict) -> Any:
    return AutoTokenizer.from_pretrained(args.model_name_or_path) if args.model_name_or_path else train_tokenizer(data)


def model_of(args: TextArguments, data: DatasetDict, tokenizer: Any) -> Any:
    names = data["train"].features["label"].names
    labels: dict[str, Any] = {"num_labels": len(names), "id2label": dict(enumerate(names)),
                              "label2id": {name: i for i, name in enumerate(names)}}  # fmt: skip
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **labels)
        return AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config)
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL, **labels)
    return AutoModelForSequenceClassification.from_config(config)


def options(args: TextArguments, data: DatasetDict, tokenizer: Any) -> dict[str, Any]:
    """What a Trainer takes: the tokenised data, the collator, the accuracy."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length))

    ready = data.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return {"train_dataset": ready["train"], "eval_dataset": ready["validation"],
            "data_collator": DataCollatorWithPadding(tokenizer), "compute_metrics": accuracy}  # fmt: skip


def accuracy(found: EvalPrediction) -> dict[str, float]:
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}


def dataset_name(args: TextArguments) -> str:
    return Path(args.train_file).name if args.train_file else "the standard library's docstrings"
