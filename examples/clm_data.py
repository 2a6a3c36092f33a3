"""The text of the language examples: files, a data set, or the Python language reference; a tokenizer of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from task import at_least, first
from transformers import PreTrainedTokenizerFast

from hf_pc.text import blocks_of, check_file, choose_block_size, hold_out, load_files, text_column

END = "<|endoftext|>"


@dataclass
class DataArguments:
    """Where the text comes from; with none of the first four given, the Python language reference."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "A text, JSON lines or CSV file, UTF-8."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to validate on."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "Share of the training text held out where there is no validation text."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per sequence; default: the model's, at most 1024."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sequences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation sequences."})

    def __post_init__(self) -> None:
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"--validation_split_percentage {self.validation_split_percentage}: 1 to 99 is needed")
        for name in ("block_size", "max_train_samples", "max_eval_samples"):
            at_least(name, getattr(self, name), 2 if name == "block_size" else 1)
        for name in ("train_file", "validation_file"):
            path = getattr(self, name)
            if path is not None:
                check_file(name, Path(path))
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file")
        if self.train_file and self.dataset_name:
            raise ValueError(
                f"--train_file {self.train_file} and --dataset_name {self.dataset_name}: give one of them"
            )

    @property
    def source(self) -> str:
        """What the text is called on a card."""
        return Path(self.dataset_name or self.train_file or "the Python language reference").name


def load_text(args: DataArguments, cache_dir: str | None, token: str | None) -> DatasetDict:
    """Splits "train" and "validation" with a column of text.

    Raises:
        ValueError: a file cannot be read, or there is no training text.
    """
    if args.dataset_name:
        raw = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    elif args.train_file:
        raw = load_files(args.train_file, args.validation_file, cache_dir)
    else:
        from pydoc_data.topics import topics

        raw = DatasetDict(train=Dataset.from_dict({"text": [topics[name] + END for name in sorted(topics)]}))
    if "train" not in raw:
        raise ValueError(f"--dataset_name {args.dataset_name} has no split 'train': it has {sorted(raw)}")
    return hold_out(raw, args.validation_split_percentage)


def check_columns(given: str, data: Dataset, text: tuple[str, ...], *others: str) -> None:
    """Raise ValueError unless a file of rows has these columns, and each row text, or something, in each.

    Args:
        given: the flag and the file, for the error.
    """
    wanted = (*text, *others)
    if not set(wanted) <= set(data.column_names):
        needed = " and ".join(map(repr, wanted))
        raise ValueError(f"{given} has the columns {data.column_names}: {needed} are needed")
    for name in wanted:
        for number, value in enumerate(data[name], 1):
            if value is None:
                raise ValueError(f"{given}: row {number} has no {name!r}")
            if name in text and not isinstance(value, str):
                raise ValueError(f"{given}: {name!r} of row {number} holds something else than text")


def load_blocks(args: DataArguments, text: DatasetDict, model: Any, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """Sequences to train and to validate on, each with `input_ids` and `labels`, [block_size].

    Raises:
        ValueError: --block_size is over the model's positions, or a split is shorter than one sequence.
    """
    cut = blocks_of(text, tokenizer, choose_block_size(args.block_size, model, tokenizer))
    return first(cut["train"], args.max_train_samples), first(cut["validation"], args.max_eval_samples)


def make_room(model: Any, tokenizer: Any) -> Any:
    """The model, with a row for every token, as transformers' own examples give it."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def train_tokenizer(data: DatasetDict, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training text alone."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    column = text_column(data)
    bpe.train_from_iterator(
        (row[column] or "" for row in data["train"]), vocab_size=vocabulary, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)
