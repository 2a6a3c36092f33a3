"""Text classification, which two examples do: the data, the model, training by PC and by backprop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clm_data import DataArguments, check_columns, train_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets
from standard_library import functions
from task import (
    SMALL_ENCODER,
    CommonArguments,
    TaskTrainingArguments,
    accuracy,
    at_least,
    class_labels,
    first,
    known_order,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
)

from hf_pc import PCConfig
from hf_pc.architecture import positions
from hf_pc.comparison import run
from hf_pc.text import load_files


@dataclass
class TextArguments(CommonArguments):
    train_file: str | None = field(
        default=None,
        metadata={"help": "JSON lines or CSV with 'text' and 'label'; default: which package a docstring is from."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same; default: every tenth row."})
    max_seq_length: int = 48
    max_train_samples: int | None = None
    classes: int = field(default=6, metadata={"help": "Packages to tell apart, where there is no train_file."})

    def __post_init__(self) -> None:
        DataArguments(train_file=self.train_file, validation_file=self.validation_file)  # complains of bad files
        at_least("classes", self.classes, 2)
        at_least("max_seq_length", self.max_seq_length, 3)  # the special tokens, and one of the text
        at_least("max_train_samples", self.max_train_samples, 1)


def load(args: TextArguments) -> DatasetDict:
    """Splits "train" and "validation" with "text" and an integer "label".

    Raises:
        ValueError: a column is missing.
    """
    if args.train_file is None:
        data = DatasetDict(train=docstrings(args.classes))
    else:
        data = load_files(args.train_file, args.validation_file)
        for split, part in data.items():
            check_columns(f"--{split}_file {getattr(args, f'{split}_file')}", part, ("text",), "label")
        names = class_names([label for part in data.values() for label in part["label"]], args)
        for split, part in data.items():
            indices = [names.index(str(label)) for label in part["label"]]
            data[split] = part.remove_columns("label").add_column("label", indices)
        data = data.cast_column("label", ClassLabel(names=names))
    if args.train_file is None or args.validation_file is None:
        whole = concatenate_datasets(list(data.values()))  # files are often sorted by class: not the last tenth
        held_out = range(0, len(whole), 10)
        rest = sorted(set(range(len(whole))) - set(held_out))
        data = DatasetDict(train=whole.select(rest), validation=whole.select(held_out))
    data["train"] = first(data["train"], args.max_train_samples)
    return data


def class_names(labels: list[Any], args: TextArguments) -> list[str]:
    """The names of the classes, in the order of their indices: those of the checkpoint, where it knows them all.

    Raises:
        ValueError: the labels are no classes, or all are one.
    """
    if any(isinstance(label, float) for label in labels):
        raise ValueError(f"--train_file {args.train_file}: 'label' holds numbers such as {labels[0]}, not classes")
    names = [str(label) for label in sorted(set(labels))]
    if len(names) < 2:
        raise ValueError(f"--train_file {args.train_file} has one class alone: at least 2 are needed")
    if args.model_name_or_path:
        return known_order(names, AutoConfig.from_pretrained(args.model_name_or_path))
    return names


def docstrings(classes: int) -> Dataset:
    """The first lines of docstrings of the packages that have most; the task is to tell which package it is."""
    found = sorted({(f.line, f.package) for f in functions() if len(f.line) > 20})
    names = [name for name, _ in Counter(package for _, package in found).most_common(classes)]
    rows = [(line, names.index(package)) for line, package in found if package in names]
    data = Dataset.from_dict({"text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    return data.cast_column("label", ClassLabel(names=names)).shuffle(seed=0)


def tokenizer_of(args: TextArguments, data: DatasetDict) -> Any:
    if not args.model_name_or_path:
        return train_tokenizer(data)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token is None:  # as of decoders
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_of(args: TextArguments, data: DatasetDict, tokenizer: Any) -> Any:
    """A classifier; with a new head where a checkpoint had another number of classes. Raises ValueError if texts are
    too long."""
    labels = class_labels(data["train"].features["label"].names)
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **labels)
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    else:
        config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL_ENCODER, **labels)
        model = AutoModelForSequenceClassification.from_config(config)
    room = positions(model) or tokenizer.model_max_length
    if args.max_seq_length > room:
        raise ValueError(f"--max_seq_length {args.max_seq_length} is over the {room} positions of the model")
    return model


def options(args: TextArguments, data: DatasetDict, tokenizer: Any) -> dict[str, Any]:
    """What a Trainer takes: the tokenised data, the collator, the accuracy."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return dict(tokenizer(rows["text"], truncation=True, max_length=args.max_seq_length))

    ready = data.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
    return {"train_dataset": ready["train"], "eval_dataset": ready["validation"],
            "data_collator": DataCollatorWithPadding(tokenizer), "compute_metrics": accuracy}  # fmt: skip


def train(
    args: TextArguments, training: TaskTrainingArguments, pc_config: PCConfig,
    adapt: Callable[[Any], Any] = lambda model: model,
) -> dict[str, Any]:  # fmt: skip
    """The figures of PC, and of backprop where it is asked for.

    Args:
        adapt: what is trained, given the classifier: itself, or with an adapter.
    """
    data = load(args)
    tokenizer = tokenizer_of(args, data)
    results, _ = run(
        adapt(model_of(args, data, tokenizer)), training, pc_config, options(args, data, tokenizer),
        compare_bp=args.compare_bp, processing_class=tokenizer,
        card={"base_model": args.model_name_or_path, "auto_class": "AutoModelForSequenceClassification",
              "dataset": Path(args.train_file).name if args.train_file else "the standard library's docstrings"},
    )  # fmt: skip
    return results
