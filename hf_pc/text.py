"""Text to train a language model on: files, what is held out of them, and their cut into sequences of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_pc.architecture import positions


def check_file(name: str, path: Path) -> None:
    """Raise ValueError, naming the flag, unless `path` is a file of UTF-8 that holds something."""
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


def _kind(path: str) -> tuple[str, dict[str, Any]]:
    """What of `datasets` reads a file, and with which options."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        ".json": ("json", {}), ".jsonl": ("json", {}), ".csv": ("csv", {"sep": ","}), ".tsv": ("csv", {"sep": "\t"})
    }  # fmt: skip
    return kinds.get(Path(path).suffix.lower(), ("text", {"keep_linebreaks": True}))


def load_files(train_file: str, validation_file: str | None = None, cache_dir: str | None = None) -> DatasetDict:
    """Splits "train" and, where its file is given, "validation", as the files have them.

    Raises:
        ValueError: a file cannot be read, or the two are of different kinds.
    """
    files = {"train": train_file}
    kind, options = _kind(train_file)
    if validation_file:
        files["validation"] = validation_file
        if _kind(validation_file) != (kind, options):
            raise ValueError(
                f"--train_file {train_file} and --validation_file {validation_file}: one kind of file is needed"
            )
    try:
        return load_dataset(kind, data_files=files, cache_dir=cache_dir, **options)
    except DatasetGenerationError as error:
        given = " or ".join(f"--{split}_file {path}" for split, path in files.items())
        raise ValueError(f"{given} cannot be read as {kind}: {error.__cause__}") from None


def hold_out(raw: DatasetDict, percentage: int) -> DatasetDict:
    """The splits, with the end of the training text to validate on where there is no other.

    Raises:
        ValueError: the column of text holds something else, or there is too little to split.
    """
    column = text_column(raw)
    some = raw["train"].select(range(min(100, len(raw["train"]))))[column]
    if not all(text is None or isinstance(text, str) for text in some):  # as a CSV file has an empty cell
        raise ValueError(f"column {column!r} of the training text holds something else than text")
    if "validation" in raw:
        return raw
    train: Dataset = raw["train"]
    held_out = max(1, len(train) * percentage // 100)
    if held_out >= len(train):
        raise ValueError(f"{len(train)} line of text cannot be split into training and validation text")
    return DatasetDict(
        train=train.select(range(len(train) - held_out)),
        validation=train.select(range(len(train) - held_out, len(train))),
    )


def text_column(data: DatasetDict) -> str:
    names: list[str] = data["train"].column_names
    return "text" if "text" in names else names[0]


def choose_block_size(asked: int | None, model: Any, tokenizer: Any) -> int:
    """Tokens per sequence: what was asked for, else as many as the model has positions for, at most 1024.

    Raises:
        ValueError: it was asked for more than the model has positions for.
    """
    room: int = positions(model) or tokenizer.model_max_length
    if asked is not None and asked > room:
        raise ValueError(f"--block_size {asked} is over the {room} positions of the model")
    return asked or min(1024, room)


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
