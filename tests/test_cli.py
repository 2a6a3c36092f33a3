"""`hf-pc nodes` on local configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_invariants import make
from transformers import T5Config, ViTConfig

from hf_pc.cli import main


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nodes_lists_the_blocks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per block, with module, shape per token, energy and precision; only config.json is needed."""
    make(name).config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path), "--precision", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    assert all(row["shape"] == [32] and row["energy"] == "gaussian" and row["precision"] == "4" for row in rows)


def test_nodes_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a person reads a table."""
    make("gpt2").config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "transformer.h.2" in shown
    assert "3 nodes" in shown


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown preset and a missing model are one line each and status 2."""
    make("gpt2").config.save_pretrained(tmp_path)
    for arguments in ([str(tmp_path), "--nodes", "blok"], [str(tmp_path / "none")]):
        assert main(["nodes", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hf-pc: ")
        assert error.count("\n") == 1


def test_nodes_of_any_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Encoder-decoders, image models and attention logits are listed too."""
    t5 = T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    vit = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
    for config, kind, count in ((t5, "AutoModelForSeq2SeqLM", 4), (vit, "AutoModelForImageClassification", 2)):
        config.save_pretrained(tmp_path / kind)
        assert main(["nodes", str(tmp_path / kind), "--auto_class", kind, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == count
    kind = "AutoModelForSeq2SeqLM"
    flags = ["--auto_class", kind, "--attention_energy", "categorical", "--json"]
    assert main(["nodes", str(tmp_path / kind), *flags]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(rows) == 4 + 6  # self-attention of four blocks, cross-attention of two
    assert rows["decoder.block.1.layer.1.EncDecAttention.logits"]["energy"] == "categorical"
