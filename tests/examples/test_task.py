"""What the examples share: which settings a run has, what a user got wrong, and the data of a classification."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_invariants import make
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_classification_pc
import run_clm_pc
import run_image_classification_pc
import run_mlm_pc
import run_seq2seq_pc
from clm_data import DataArguments, train_tokenizer
from task import DEMO, CommonArguments, TaskTrainingArguments, launch, parse
from text_task import TextArguments, class_names, load

from hf_pc import PCConfig
from hf_pc.text import hold_out, load_files
from hf_pc.trainer import NonFiniteEnergyError

KINDS = CommonArguments, TaskTrainingArguments


def rows(path: Path, *given: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, given)))
    return path


@pytest.mark.parametrize("flags", [[], ["--sweeps", "3"], ["--max_steps", "7"]])
def test_a_demonstration_has_its_settings(flags: list[str]) -> None:
    """Those that are given apart."""
    args = parse(KINDS, flags)[1]
    assert args.learning_rate == DEMO["learning_rate"]
    assert args.max_steps == (7 if "--max_steps" in flags else DEMO["max_steps"])
    assert args.do_train
    assert args.do_eval


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--model_name"])
def test_a_run_of_ones_own_has_those_of_transformers(flag: str) -> None:
    """However the flag is spelt; --num_train_epochs, which a number of steps would overrule, is followed."""
    args = parse(KINDS, [flag, "M"])[1]
    plain = TrainingArguments(output_dir="runs")
    for name in ("learning_rate", "max_steps", "lr_scheduler_type", "per_device_train_batch_size", "eval_strategy"):
        assert getattr(args, name) == getattr(plain, name)
    assert args.do_train
    assert args.do_eval
    assert parse(KINDS, ["--num_train_epochs", "2"])[1].max_steps == -1
    assert not parse(KINDS, ["--do_eval", "false"])[1].do_eval


def test_every_example_takes_a_file_of_settings(tmp_path: Path) -> None:
    """What it holds is as if it were written on the command line."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"learning_rate": 0.25, "relaxed_fraction": 0.2}))
    _, args, config = parse(KINDS, [str(path)])
    assert (args.learning_rate, config.relaxed_fraction) == (0.25, 0.2)


@pytest.mark.parametrize("error", [ValueError, OSError, FileExistsError, NonFiniteEnergyError])
def test_what_a_user_got_wrong_is_one_line(error: type[Exception]) -> None:
    """As a checkpoint that is not there, which transformers says by an OSError."""

    def wrong() -> None:
        raise error("this is wrong")

    with pytest.raises(SystemExit, match=r"^error: this is wrong$"):
        launch(wrong)


def test_classes_are_in_order(tmp_path: Path) -> None:
    """Numbers by value; names as the checkpoint has them, if it knows just these; what is measured is none."""
    args = TextArguments()
    assert class_names([10, 9, 2, 10], args) == ["2", "9", "10"]
    assert class_names(["b", "a"], args) == ["a", "b"]
    config = AutoConfig.for_model("bert", label2id={"b": 0, "a": 1}, id2label={0: "b", 1: "a"})
    config.save_pretrained(tmp_path)
    known = TextArguments(model_name_or_path=str(tmp_path))
    assert class_names(["a", "b"], known) == ["b", "a"]
    assert class_names(["a", "c"], known) == ["a", "c"]
    AutoConfig.for_model("bert", label2id={"c": 0, "b": 1, "a": 2}, id2label={0: "c", 1: "b", 2: "a"}).save_pretrained(
        tmp_path
    )
    assert class_names(["a", "b"], known) == ["c", "b", "a"]
    with pytest.raises(ValueError, match=r"'label' holds numbers such as 0\.5, not classes"):
        class_names([0.5, 1.25], args)
    with pytest.raises(ValueError, match="one class alone"):
        class_names(["a", "a"], args)


def test_rows_of_a_classification(tmp_path: Path) -> None:
    """Other columns do not matter, whichever comes first; one that is missing, or a row without it, is named."""
    path = rows(tmp_path / "rows.jsonl", *({"id": i, "label": i % 12, "text": f"text {i}"} for i in range(60)))
    data = load(TextArguments(train_file=str(path)))
    assert data["train"].features["label"].names == [str(i) for i in range(12)]
    assert all(row["label"] == row["id"] % 12 for part in data.values() for row in part)
    path = rows(tmp_path / "few.jsonl", {"label": 1, "sentence": "a"}, {"label": 2, "sentence": "b"})
    with pytest.raises(ValueError, match="'text' and 'label' are needed"):
        load(TextArguments(train_file=str(path)))
    whole = path = rows(
        tmp_path / "whole.jsonl", *({"label": "no" if i % 2 else "yes", "text": str(i)} for i in range(9))
    )
    assert load(TextArguments(train_file=str(path)))["train"].features["label"].names == ["no", "yes"]
    path = rows(tmp_path / "gap.jsonl", {"label": "no", "text": "a"}, {"label": None, "text": "b"})
    with pytest.raises(ValueError, match=r"--validation_file .*gap\.jsonl: row 2 has no 'label'"):
        load(TextArguments(train_file=str(whole), validation_file=str(path)))
    path = rows(tmp_path / "numbers.jsonl", {"label": 1, "text": 3}, {"label": 2, "text": 4})
    with pytest.raises(ValueError, match="'text' of row 1 holds something else than text"):
        load(TextArguments(train_file=str(path)))


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("ROWS.CSV", ","), ("rows.tsv", "\t")])
def test_tables_of_text(tmp_path: Path, name: str, mark: str) -> None:
    """The suffix says how cells are parted, in whatever case; an empty cell is text of no length."""
    path = tmp_path / name
    path.write_text(f"text{mark}other\n" + "".join(f"line {i}{mark}{i}\n" for i in range(30)) + f"{mark}3\n" * 3)
    data = hold_out(load_files(str(path)), 10)
    assert data["train"]["text"][0] == "line 0"
    assert train_tokenizer(data, 300)("line")["input_ids"]


def test_pairs_may_have_other_columns(tmp_path: Path) -> None:
    """The first of a row may be a number."""
    path = rows(tmp_path / "pairs.jsonl", *({"id": i, "source": "a", "target": "b"} for i in range(20)))
    data = run_seq2seq_pc.load_pairs(run_seq2seq_pc.Arguments(train_file=str(path)))
    assert len(data["train"]) + len(data["validation"]) == 20


def test_overrides_are_changes_to_the_small_model(tmp_path: Path) -> None:
    """Not to the one of transformers' defaults; of a checkpoint nothing is changed."""
    path = rows(tmp_path / "pairs.jsonl", *({"source": f"a {i}", "target": f"b {i}"} for i in range(20)))
    args = run_seq2seq_pc.Arguments(train_file=str(path), config_overrides="num_layers=1")
    tokenizer = run_seq2seq_pc.load_tokenizer(args, run_seq2seq_pc.load_pairs(args))
    config = run_seq2seq_pc.build(args, tokenizer).config
    assert (config.num_layers, config.d_model, config.dropout_rate) == (1, 128, 0.0)
    with pytest.raises(ValueError, match="--config_overrides is for models trained from scratch"):
        run_seq2seq_pc.Arguments(model_name_or_path="M", config_overrides="num_layers=1")


def test_a_decoder_classifies(tmp_path: Path) -> None:
    """A checkpoint without a padding token takes its end token for it; texts over its positions are refused."""
    path = rows(tmp_path / "rows.jsonl", *({"text": "a" * (i + 1), "label": i % 2} for i in range(20)))
    data = load(TextArguments(train_file=str(path)))
    tokenizer = train_tokenizer(data, 300)
    tokenizer.pad_token = None
    make("gpt2").save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", vocab_size=len(tokenizer))
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = ["--train_file", str(path), "--model_name_or_path", str(tmp_path / "model"), "--max_steps", "1"]
    given += [
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--no_compare_bp",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match=r"--max_seq_length 48 is over the \d+ positions of the model"):
        run_classification_pc.main(given)
    found = run_classification_pc.main([*given, "--max_seq_length", "16"])
    assert 0 <= found["pc_accuracy"] <= 1


def test_evaluating_keeps_the_figures_of_training(tmp_path: Path) -> None:
    """Those of the new evaluation take the place of the old ones, and nothing else changes."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(300)) + "\n")
    out = tmp_path / "out"
    flags = ["--train_file", str(path), "--block_size", "16", "--report_to", "none", "--disable_tqdm", "true"]
    flags += ["--output_dir", str(out), "--use_cpu"]
    small = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32"]
    before = run_clm_pc.main([*flags, *small, "--max_steps", "2"])
    run_clm_pc.main([*flags, "--model_name_or_path", str(out), "--do_train", "false", "--max_eval_samples", "2"])
    after = json.loads((out / "all_results.json").read_text())
    assert after["pc_eval_loss"] != before["pc_eval_loss"]
    changed = {"pc_eval_loss", "pc_perplexity"}
    assert {n: v for n, v in after.items() if n not in changed} == {
        n: v for n, v in before.items() if n not in changed
    }


@pytest.mark.parametrize("script", [run_clm_pc, run_mlm_pc])
def test_a_larger_tokenizer_has_rows_in_the_model(tmp_path: Path, script: Any) -> None:
    """As transformers' own examples, which add the rows that are missing."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(300)) + "\n")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small = make("gpt2") if script is run_clm_pc else BertForMaskedLM(BertConfig(vocab_size=50, **sizes))
    small.save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer(hold_out(load_files(str(path)), 10), 300)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path / "model")
    given = ["--train_file", str(path), "--model_name_or_path", str(tmp_path / "model"), "--max_steps", "1"]
    given += ["--block_size", "8", "--report_to", "none", "--disable_tqdm", "true", "--no_compare_bp"]
    script.main([*given, "--output_dir", str(tmp_path / "out"), "--max_eval_samples", "2"])
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size >= len(tokenizer)


def test_a_new_model_knows_the_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    """Whatever padding token the type of model has by default, which a small vocabulary may lack."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(300)) + "\n")
    data = hold_out(load_files(str(path)), 10)
    sizes = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
    args = run_clm_pc.ModelArguments(model_type="phi3", config_overrides=sizes)
    model, tokenizer = run_clm_pc.load_model_and_tokenizer(args, data)
    assert model.config.pad_token_id == tokenizer.pad_token_id < model.config.vocab_size


def test_images_that_have_no_classes(tmp_path: Path) -> None:
    """A folder of images alone says of none what it is."""
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    args = run_image_classification_pc.ImageArguments(model_name_or_path="M", train_dir=str(tmp_path))
    with pytest.raises(ValueError, match="holds no two folders of images"):
        run_image_classification_pc.load(args, 0)


@pytest.mark.parametrize(("flags", "expected"), [([], 200), (["--train_file", __file__], None)])
def test_the_demonstration_alone_evaluates_on_a_part(flags: list[str], expected: int | None) -> None:
    """Of text of the user's own all is evaluated."""
    assert parse((DataArguments, TaskTrainingArguments), flags, run_mlm_pc.MLM_DEMO)[0].max_eval_samples == expected


def test_help_shows_the_settings_of_the_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    """As they hold without a model or data of one's own."""
    with pytest.raises(SystemExit, match="0"):
        parse(KINDS, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.0005)" in said
    assert "<object" not in said
    assert "==SUPPRESS==" not in said


def test_several_nodes_in_a_file(tmp_path: Path) -> None:
    """A list is what their names with commas between are on a command line."""
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"nodes": ["h.0", "h.1"]}))
    assert parse(KINDS, [str(path)])[-1].nodes == PCConfig(nodes="h.0,h.1").nodes
