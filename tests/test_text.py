"""Text files cut into sequences, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from transformers import GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from hf_pc.text import blocks_of, choose_block_size, hold_out, load_files


def tokenizer(text: str, **options: bool) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) for character in text]}


def lines(*texts: object) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


def test_a_file_to_validate_on_is_used(tmp_path: Path) -> None:
    """A second file of the same kind is the validation text, and nothing is held out of the first."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name * i}) + "\n" for i in range(1, 4)))
    raw = load_files(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), cache_dir=str(tmp_path / "cache"))
    kept = hold_out(raw, 10)
    assert kept["train"]["text"][:] == ["a", "aa", "aaa"]
    assert kept["validation"]["text"][:] == ["b", "bb", "bbb"]


def test_the_end_of_the_text_is_held_out() -> None:
    """Without one the last lines are, one at least; a single line cannot be split."""
    kept = hold_out(DatasetDict(train=lines("a", "b", "c", "d")), 10)
    assert kept["train"]["text"][:] == ["a", "b", "c"]
    assert kept["validation"]["text"][:] == ["d"]
    with pytest.raises(ValueError, match="1 line of text cannot be split"):
        hold_out(DatasetDict(train=lines("a")), 10)
    with pytest.raises(ValueError, match="column 'text' of the training text holds something else than text"):
        hold_out(DatasetDict(train=lines(1, 2)), 10)


def test_blocks_are_whole() -> None:
    """Running text is cut into sequences of equal length, the remainder dropped; too little text is an error."""
    data = DatasetDict(train=lines("abc", "", "defg"), validation=lines("xyz"))
    found = blocks_of(data, tokenizer, 3)
    assert ["".join(map(chr, ids)) for ids in found["train"]["input_ids"]] == ["abc", "def"]
    assert found["train"]["labels"][:] == found["train"]["input_ids"][:]
    with pytest.raises(ValueError, match="the validation text has fewer than --block_size 4 tokens"):
        blocks_of(data, tokenizer, 4)


def test_a_block_fits_the_model() -> None:
    """As long as asked for, or as the model has positions, at most 1,024; more than it has is refused."""
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    other = XLNetLMHeadModel(XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=1, d_inner=8))
    words = SimpleNamespace(model_max_length=4096)
    assert choose_block_size(None, model, words) == 64
    assert choose_block_size(32, model, words) == 32
    assert choose_block_size(None, other, words) == 1024  # without end, says XLNet by -1
    assert choose_block_size(None, other, SimpleNamespace(model_max_length=512)) == 512
    with pytest.raises(ValueError, match="--block_size 65 is over the 64 positions of the model"):
        choose_block_size(65, model, words)
