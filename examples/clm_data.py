"""The text of run_clm_pc.py: files, a data set, or the Python language reference; tokenised and cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from task import at_least
from transformers import PreTrainedTokenizerFast

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
                _check_file(name, Path(path))
        if self.validation_file and not self.train_file:
            raise ValueError("--validation_file needs --train_file")
        if self.train_file and self.dataset_name:
            raise ValueError(
                f"--train_file {self.train_file} and --dataset_name {self.dataset_name}: give one of them"
            )


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--{name} {path}: there is no such file")
    filled = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                filled = bool(line.decode("utf-8").strip()) or filled
            except UnicodeDecodeError as error:
                wrong = f"byte {error.start} of line {number} is {line[error.start]:#04x}"
                raise ValueError(f"--{name} {path} is not UTF-8: {wrong}") from None
    if not filled:
        raise ValueError(f"--{name} {path} is empty")


def _kind(path: str) -> str:
    return {".json": "json", ".jsonl": "json", ".csv": "csv"}.get(Path(path).suffix, "text")


def _load_files(args: DataArguments, cache_dir: str | None) -> DatasetDict:
    assert args.train_file is not None
    files, kind = {"train": args.train_file}, _kind(args.train_file)
    if args.validation_file:
        files["validation"] = args.validation_file
        if _kind(args.validation_file) != kind:
            raise ValueError(
                f"--train_file {args.train_file} and --validation_file {args.validation_file}: one kind of "
                "file is needed"
            )
    options: dict[str, Any] = {"keep_linebreaks": True} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=files, cache_dir=cache_dir, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"--train_file {args.train_file} cannot be read as {kind}: {error.__cause__}") from None


def load_text(args: DataArguments, cache_dir: str | None, token: str | None) -> DatasetDict:
    """Splits "train" and "validation" with a column of text.

    Raises:
        ValueError: a file cannot be read, or there is no training text.
    """
    if args.dataset_name:
        raw = load_dataset(args.dataset_name, args.dataset_config_name, cache_dir=cache_dir, token=token)
    elif args.train_file:
        raw = _load_files(args, cache_dir)
    else:
        from pydoc_data.topics import topics

        raw = DatasetDict(train=Dataset.from_dict({"text": [topics[name] + END for name in sorted(topics)]}))
    if "train" not in raw:
        raise ValueError(f"--dataset_name {args.dataset_name} has no split 'train': it has {sorted(raw)}")
    column = text_column(raw)
    if not all(isinstance(row[column], str) for row in raw["train"].select(range(min(100, len(raw["train"]))))):
        raise ValueError(f"column {column!r} of the training text holds something else than text")
    if "validation" not in raw:
        train = raw["train"]
        held_out = max(1, len(train) * args.validation_split_percentage // 100)
        if held_out >= len(train):
            raise ValueError(f"{len(train)} line of text cannot be split into training and validation text")
        raw = DatasetDict(
            train=train.select(range(len(train) - held_out)),
            validation=train.select(range(len(train) - held_out, len(train))),
        )
    return raw


def text_column(data: DatasetDict) -> str:
    names: list[str] = data["train"].column_names
    return "text" if "text" in names else names[0]


def train_tokenizer(data: DatasetDict, vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the training text alone."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    column = text_column(data)
    bpe.train_from_iterator(
        (row[column] for row in data["train"]), vocab_size=vocabulary, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)


def blocks_of(data: DatasetDict, tokenizer: Any, block_size: int) -> DatasetDict:
    """Tokenise and cut the running text into sequences of `block_size`; the remainder is dropped."""
    column = text_column(data)

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = [i for text in batch[column] if text for i in tokenizer(text, verbose=False)["input_ids"]]
        whole = len(ids) // block_size * block_size
        sequences = [ids[i : i + block_size] for i in range(0, whole, block_size)]
        return {"input_ids": sequences, "labels": [list(s) for s in sequences]}

    cut_data = data.map(
        cut, batched=True, batch_size=10_000, remove_columns=data["train"].column_names, load_from_cache_file=False
    )
    for split in ("train", "validation"):
        if not len(cut_data[split]):
            raise ValueError(f"the {split} text has fewer than --block_size {block_size} tokens")
    return cut_data
