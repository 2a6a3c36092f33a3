"""`hf-pc compare`: predictive coding against backprop on a text, from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console
from test_invariants import make
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

from hf_pc import PCConfig
from hf_pc.cli import main
from hf_pc.commands import compare
from hf_pc.commands.waiting import stages
from hf_pc.trainer import NonFiniteEnergyError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path) -> Path:
    """A folder with a configuration and a tokenizer that fits it, and no weights."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text)], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    folder = tmp_path / "config"
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=300, **ids).save_pretrained(folder)
    return folder


def test_compare_from_scratch_and_from_weights(
    tmp_path: Path, text: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides are trained and evaluated; at T = 1 they end alike. Figure, checkpoint and card are left, and that
    checkpoint is a start for the next comparison."""
    out, short = tmp_path / "out", ["--train_file", str(text), "--steps", "3", "--block_size", "16"]
    asked = [str(config), *short, "--sweeps", "1", "--output_dir", str(out)]
    assert main(["compare", *asked, "--json"]) == 0
    printed = capsys.readouterr()
    assert "PC: 100%" in printed.err  # the bar says which side is trained
    assert "backprop: 100%" in printed.err
    found = json.loads(printed.out)
    assert found["pc_perplexity"] == pytest.approx(found["bp_perplexity"], rel=1e-4)
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")
    assert "It was trained from scratch" in (out / "README.md").read_text(encoding="utf-8")
    assert main(["card", str(out), "--overwrite"]) == 0
    assert "It was trained from scratch. Data: text.txt." in (out / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    AutoModelForCausalLM.from_pretrained(found["checkpoint"])
    assert main(["compare", *asked]) == 2
    assert "holds something already" in capsys.readouterr().err
    rule = ["--learning", "one_sided", "--strengths", "1", "0.25"]
    assert main(["compare", str(out), *short, *rule, "--output_dir", str(tmp_path / "next")]) == 0
    assert PCConfig.from_pretrained(tmp_path / "next").strengths == [1.0, 0.25]
    shown = capsys.readouterr().out
    assert "relaxed_fraction" in shown
    assert "learning.png" in shown
    assert "It started from out." in (tmp_path / "next" / "README.md").read_text(encoding="utf-8")
    assert main(["card", str(tmp_path / "next"), "--overwrite"]) == 0
    assert "It started from out. Data: text.txt." in (tmp_path / "next" / "README.md").read_text(encoding="utf-8")
    assert "base_model" not in ModelCard.load(tmp_path / "next" / "README.md").data.to_dict()  # it is a folder's name
    drawn = ["--solver", "langevin", "--precision", "5", "--output_dir", str(tmp_path / "drawn")]
    capsys.readouterr()
    logging.set_verbosity_error()  # with which transformers prints logs instead of bars
    try:
        assert main(["compare", str(out), *short, *drawn, "--json"]) == 0
    finally:
        logging.set_verbosity_warning()
    assert json.loads(capsys.readouterr().out)["regime"]
    assert PCConfig.from_pretrained(tmp_path / "drawn").precision == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps 0 is not allowed"),
        (["--learning_rate", "nan"], "--learning_rate nan is not allowed"),
        (["--validation_percentage", "100"], "1 to 99"),
        (["--train_file", "none.txt"], "--train_file none.txt: there is no such file"),
        (["--block_size", "64"], "over the 32 positions"),
        (["--nodes", "blok"], "neither a preset"),
        (["--output_dir", "text.txt"], "is a file"),
        (["--output_dir", "config"], "is the model's own folder"),
        (["--tokenizer", "bare"], "bare holds no tokenizer"),
    ],
)
def test_wrong_input_is_one_line(
    text: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str],
    message: str,
) -> None:  # fmt: skip
    """What is wrong is named in one line, with status 2, and no folder is made."""
    monkeypatch.chdir(text.parent)
    make("gpt2").config.save_pretrained("bare")
    capsys.readouterr()
    assert main(["compare", "config", "--train_file", "text.txt", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-pc: ")
    assert message in error
    assert not Path("runs").exists()


def test_a_vocabulary_that_does_not_fit(text: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tokenizer with more tokens than the model has embeddings is refused."""
    make("gpt2").config.save_pretrained(config)
    assert main(["compare", str(config), "--train_file", str(text)]) == 2
    assert "give a --tokenizer that fits" in capsys.readouterr().err


def test_divergence_is_status_1(
    text: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A side that ends with no finite loss, and a run that stopped over it, are failures; JSON holds null."""
    monkeypatch.chdir(text.parent)
    asked = ["compare", "config", "--train_file", "text.txt", "--json"]
    lost = {"pc_eval_loss": float("nan"), "bp_eval_loss": 1.0}
    monkeypatch.setattr(compare, "train_both", lambda *args, **kwargs: (lost, None))
    assert main(asked) == 1
    assert json.loads(capsys.readouterr().out)["pc_eval_loss"] is None

    def stop(error: BaseException) -> Any:
        def train(*args: Any, **kwargs: Any) -> Any:
            raise error

        return train

    for error, status in ((NonFiniteEnergyError("not finite"), 1), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr(compare, "train_both", stop(error))
        assert main(asked) == status
        assert capsys.readouterr().err.splitlines()[-1].startswith("hf-pc: ")


def test_stages_are_shown_on_a_terminal_alone() -> None:
    """A terminal shows the stage that runs; what is no terminal stays clean."""
    for terminal in (True, False):
        shown = io.StringIO()
        with stages(2, Console(file=shown, force_terminal=terminal, width=80)) as begin:
            begin("first")
            begin("second")
        assert ("second" in shown.getvalue()) is terminal
