"""The example, end to end on a local file: what it leaves behind, and what it refuses before it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_clm_pc
from clm_data import DataArguments
from task import TaskTrainingArguments, parse

SMALL = "n_layer=2,n_embd=16,n_head=2,n_positions=32"
KEYS = {
    "pc_eval_loss", "pc_perplexity", "bp_eval_loss", "bp_perplexity", "relaxed_fraction", "residual", "regime",
    "pc_step_seconds", "bp_step_seconds", "step_time_ratio", "energies", "base_model", "dataset",
    "base_on_hub",
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(400)) + "\n")
    return path


def run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    common = ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
    return run_clm_pc.main([*common, *flags])


def test_what_a_run_leaves(tmp_path: Path, text: Path) -> None:
    """Checkpoint, tokenizer, pc_config.json, card, figure and every figure of the table are in the output folder."""
    flags = ["--block_size", "32", "--config_overrides", SMALL, "--max_steps", "4", "--logging_steps", "2"]
    results = run(tmp_path, "--train_file", str(text), *flags, "--sweeps", "2", "--relaxed_fraction", "0.05")
    out = tmp_path / "out"
    assert set(results) == KEYS
    assert json.loads((out / "all_results.json").read_text()) == results
    assert json.loads((out / "pc_config.json").read_text())["sweeps"] == 2
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("line")["input_ids"]
    card = (out / "README.md").read_text()
    assert "predictive-coding" in card
    assert f"{results['pc_perplexity']:.2f}" in card
    assert "backprop |\n|---|---|---|\n| validation loss" in card  # rows of one table, no gaps
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "does"),
    [
        ([], (True, True)),
        (["--do_train"], (True, False)),
        (["--do_train", "false"], (False, True)),
        (["--do_train", "false", "--eval_strategy", "epoch"], (False, True)),
        (["--do_train", "--eval_strategy", "epoch"], (True, True)),
        (["--do_eval"], (False, True)),
        (["--do_eval", "false"], (True, False)),
    ],
)
def test_what_a_run_does(tmp_path: Path, text: Path, flags: list[str], does: tuple[bool, bool]) -> None:
    """Without a word on it a run trains and evaluates; one that is told not to train evaluates alone."""
    given = ["--output_dir", str(tmp_path), "--train_file", str(text), "--use_cpu", *flags]
    args = parse((DataArguments, TaskTrainingArguments), given)[1]
    assert (args.do_train, args.do_eval) == does


def test_resume_and_fine_tuning(tmp_path: Path, text: Path) -> None:
    """A run resumes from its checkpoint, and a saved model is a start for the next run."""
    flags = ["--train_file", str(text), "--block_size", "32", "--no_compare_bp", "--do_train", "--save_steps", "2"]
    scratch = ["--config_overrides", SMALL]
    run(tmp_path, *flags, *scratch, "--max_steps", "2")
    run(tmp_path, *flags, *scratch, "--max_steps", "4", "--resume_from_checkpoint", "true")
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    model = str(tmp_path / "out" / "checkpoint-4")
    run(tmp_path / "next", *flags, "--model_name_or_path", model, "--max_steps", "1")
    assert (tmp_path / "next" / "out" / "model.safetensors").is_file()


def test_a_finished_run_is_resumed_to_evaluate(tmp_path: Path, text: Path) -> None:
    """Without a step left there is no time of a step; the rest is there."""
    flags = ["--train_file", str(text), "--block_size", "32", "--config_overrides", SMALL, "--no_compare_bp"]
    flags += ["--do_train", "--num_train_epochs", "1", "--save_strategy", "epoch"]
    run(tmp_path, *flags)
    run(tmp_path, *flags, "--resume_from_checkpoint", "true", "--do_eval")
    figures = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert "pc_eval_loss" in figures
    assert "pc_step_seconds" not in figures


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], "there is no such file"),
        (b"", [], "is empty"),
        (b"caf\xe9 \n", [], "is not UTF-8"),
        (b"some text\n" * 50, ["--block_size", "64"], "over the 32 positions"),
        (b"some text\n" * 50, ["--sweeps", "0"], "sweeps=0"),
        (
            b"".join(b"line %d, %d\n" % (i, i * i) for i in range(300)),
            ["--nodes", "blok", "--block_size", "16"],
            "neither a preset",
        ),
    ],
)
def test_bad_input_leaves_no_folder(tmp_path: Path, content: bytes | None, flags: list[str], message: str) -> None:
    """Bad input is an error that names it, before training starts, and no output folder is made."""
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--train_file", str(path), "--config_overrides", SMALL, *flags)
    assert not (tmp_path / "out").exists()


def test_a_data_set_by_name(tmp_path: Path, text: Path) -> None:
    """`--dataset_name` takes a folder as load_dataset does; its column "text" is read and its splits are kept."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [json.dumps({"id": i, "text": line}) for i, line in enumerate(text.read_text().splitlines())]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    flags = ["--block_size", "32", "--config_overrides", SMALL, "--max_steps", "1", "--no_compare_bp"]
    results = run(tmp_path, "--dataset_name", str(folder), *flags)
    assert results["pc_perplexity"] > 1
    assert "corpus" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float99"], "--dtype float99"),
        (["--train_file", "bad.json"], "cannot be read as json"),
        (["--train_file", "ids.jsonl"], "holds something else than text"),
        (["--train_file", "text.txt", "--validation_file", "ids.jsonl"], "one kind of file"),
        (["--train_file", "latin.txt"], "byte 4 of line 2 is 0xe9"),
        (["--train_file", "text.txt", "--output_dir", "text.txt"], "is a file"),
        (["broken.yaml"], "broken.yaml cannot be read"),
        (["list.json"], "no table of settings"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    """What cannot be read or done is named before anything is made."""
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"text": "a"')
    Path("ids.jsonl").write_text('{"id": 1}\n{"id": 2}\n')
    Path("latin.txt").write_bytes(b"fine\ncafe\xe9\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("list.json").write_text("[1]")
    with pytest.raises(ValueError, match=message):
        run_clm_pc.main(flags)
    assert not (tmp_path / "runs").exists()


def test_settings_from_a_file(tmp_path: Path, text: Path) -> None:
    """A YAML file gives what the flags give; numbers such as 2e-3, which YAML reads as text, are numbers."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"train_file: {text}\nblock_size: 32\nconfig_overrides: {SMALL}\nmax_steps: 2\nlearning_rate: 2e-3\n"
        f"relaxed_fraction: 5e-2\ncompare_bp: false\nuse_cpu: true\nreport_to: none\noutput_dir: {tmp_path / 'out'}\n"
        "eval_strategy: 'no'\n"
    )
    assert set(run_clm_pc.main([str(settings)])) & KEYS == {
        key for key in KEYS if "bp" not in key and "ratio" not in key
    }
    assert json.loads((tmp_path / "out" / "pc_config.json").read_text())["relaxed_fraction"] == 0.05


def test_an_evaluation_strategy_still_trains(tmp_path: Path, text: Path) -> None:
    """With neither --do_train nor --do_eval both are done; backprop too ends with its best checkpoint.

    The baseline is removed with its own folder, and nothing else is.
    """
    flags = ["--train_file", str(text), "--block_size", "32", "--config_overrides", SMALL, "--max_steps", "4"]
    best = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--load_best_model_at_end"]
    kept = tmp_path / "out" / "backprop" / "model.safetensors"  # of somebody's own
    kept.parent.mkdir(parents=True)
    kept.touch()
    results = run(tmp_path, *flags, *best)
    assert set(results) == KEYS
    assert kept.exists()
    assert not list((tmp_path / "out").glob("_backprop*"))
