"""`hf-pc`, every command on local folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from test_invariants import make
from test_relaxation import reformer
from test_reuse import mixtral
from test_trainer import trainer
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

from hf_pc import PCConfig
from hf_pc.cli import COMMANDS, main


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nodes_lists_the_blocks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row per block, with module, shape per token, energy and precision; only config.json is needed."""
    make(name).config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path), "--precision", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    assert all(row["shape"] == [32] and row["energy"] == "gaussian" and row["precision"] == "4" for row in rows)


def test_nodes_says_what_holds_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The strength of a node is its precision, a share of its activity, or what is steered to."""
    make("gpt2").config.save_pretrained(tmp_path)
    shown = {"--relative_std": ("0.2", "1 / (0.2 RMS)^2"), "--relaxed_fraction": ("0.1", "steered to")}
    for flag, (value, expected) in shown.items():
        assert main(["nodes", str(tmp_path), flag, value, "--json"]) == 0
        assert all(row["precision"].startswith(expected) for row in json.loads(capsys.readouterr().out))


def test_nodes_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json a person reads a table."""
    make("gpt2").config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "transformer.h.2" in shown
    assert "3 nodes" in shown


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown preset, a missing model and a missing run are one line each and status 2."""
    make("gpt2").config.save_pretrained(tmp_path)
    none = str(tmp_path / "none")
    for arguments in (["nodes", str(tmp_path), "--nodes", "blok"], ["nodes", none], ["plot", none], ["card", none]):
        assert main(arguments) == 2
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


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command shows one that begins with its own name."""
    for name, command in COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"example: hf-pc {name} " in shown
        assert command.HELP.split(":")[0] in shown


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sound model passes: gradients as backprop's, regime, curvature, time, memory, and what else could be nodes."""
    make("gpt2").save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--sequence", "8", "--batch", "2", "--json"]) == 0
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["nodes"]["value"] == 3
    assert rows["output energy against the model's own loss"]["value"] == "the same"
    assert rows["gradient at T = 1 against backprop's"]["value"] < 1e-4
    assert rows["largest curvature of the free energy"]["value"] > 0
    assert rows["time of a step over backprop's"]["value"] > 1
    assert rows["memory that relaxation adds"]["value"] == pytest.approx(4 * 3 * 8 * 32 * 4 / 2**20)
    assert rows["nodes='linear'"]["value"] == "works"
    assert main(["doctor", str(tmp_path), "--sequence", "8", "--batch", "2"]) == 0
    assert "3 sweeps" in capsys.readouterr().out


def test_doctor_of_a_classifier_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration is enough, and its layers that drop are warned of."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=3, **sizes)
    config.layerdrop = 0.1
    config.save_pretrained(tmp_path)
    kind = "AutoModelForSequenceClassification"
    assert main(["doctor", str(tmp_path), "--auto_class", kind, "--random_weights", "--json"]) == 0
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["several processes"]["verdict"] == "warning"
    assert main(["doctor", str(tmp_path), "--auto_class", kind]) == 2  # there are no weights
    assert capsys.readouterr().err.startswith("hf-pc: ")


def test_doctor_builds_the_class_that_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A masked language model is checked as one, with no --auto_class; a sequence over the positions is refused."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    for weights in ([], ["--random_weights"]):
        assert main(["doctor", str(tmp_path / "bert"), *weights, "--sequence", "8", "--json"]) == 0
        rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows["output energy against the model's own loss"]["value"] == "the same"  # not shifted
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, max_target_positions=16, **heads)
    whisper.architectures = ["WhisperForConditionalGeneration"]
    whisper.save_pretrained(tmp_path / "whisper")
    assert main(["doctor", str(tmp_path / "whisper"), "--random_weights", "--sequence", "17"]) == 2
    assert "--sequence 17 is over the 16 positions" in capsys.readouterr().err


def test_models_that_a_trial_fails_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BART's forward needs numbers, so that shapes are missing; that Reformer's blocks cannot relax is one line."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 8}
    bart = BartConfig(**sizes, **heads)
    bart.architectures = ["BartForConditionalGeneration"]
    bart.save_pretrained(tmp_path / "bart")
    assert main(["nodes", str(tmp_path / "bart"), "--json"]) == 0
    assert [row["shape"] for row in json.loads(capsys.readouterr().out)] == [[16], None]  # the decoder is not reached
    reformer(16).save_pretrained(tmp_path / "reformer")
    assert main(["doctor", str(tmp_path / "reformer"), "--sequence", "8"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-pc: no signal came to any node of ReformerModelWithLMHead")


def test_doctor_fails_where_gradients_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose gradients at T = 1 are not backprop's is a failed check and status 1."""
    make("gpt2").save_pretrained(tmp_path)
    wrong = {"a": {"cosine": 1.0, "norm_ratio": 1.0, "backprop_norm": 1.0},
             "b": {"cosine": 0.0, "norm_ratio": 0.0, "backprop_norm": 1.0}}  # fmt: skip
    monkeypatch.setattr("hf_pc.commands.doctor.compare_with_backprop", lambda pc, batch, group: wrong)
    assert main(["doctor", str(tmp_path), "--sequence", "8", "--json"]) == 1
    rows = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gradient at T = 1 against backprop's"]["note"].endswith("at b")


def test_plot_and_card_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder is enough for its picture, even before it ends, and with its figures for its card."""
    run = trainer(tmp_path / "run", PCConfig(sweeps=3, relaxed_fraction=0.05), max_steps=4, save_strategy="steps",
                  save_steps=2, eval_strategy="steps", eval_steps=2)  # fmt: skip
    run.train()
    capsys.readouterr()
    folder = str(tmp_path / "run")
    assert main(["plot", folder, "--json"]) == 0  # from the last checkpoint
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 4
    assert found["relaxed_fraction"] > 0
    assert Path(found["figure"]).read_bytes().startswith(b"\x89PNG")
    run.save_model()
    figures = tmp_path / "run" / "all_results.json"
    figures.write_text(json.dumps({"pc_eval_loss": 3.9, "pc_perplexity": 49.4}))
    assert main(["card", folder, "--dataset", "rows"]) == 0
    assert "49.4" in (tmp_path / "run" / "README.md").read_text()
    capsys.readouterr()
    assert main(["card", folder]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    noted = {"pc_eval_loss": 3.9, "pc_perplexity": 49.4, "dataset_id": "someone/rows"}
    for given, expected in (("AutoModelForMaskedLM", "AutoModelForMaskedLM"), ("os.system", "AutoModelForCausalLM")):
        figures.write_text(json.dumps(noted | {"auto_class": given}))  # what a run notes makes the same card again
        assert main(["card", folder, "--overwrite"]) == 0
        card = (tmp_path / "run" / "README.md").read_text()
        assert expected in card
        assert "os.system" not in card
        assert "- someone/rows" in card
    assert main(["card", folder, "--overwrite", "--dataset", "other rows"]) == 0
    assert "someone/rows" not in (tmp_path / "run" / "README.md").read_text()
    figures.write_text("{}")
    assert main(["card", folder, "--overwrite"]) == 2
    assert "49.4" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("content", [None, "", "[]", '{"log_history": []}', '{"log_history": [1]}', "{}"])
def test_plot_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    """A folder without a log, or with a broken one: one line, status 2, no picture."""
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-pc: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


def test_errors_are_json_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output holds one object with the line of standard error, also where the arguments are no arguments."""
    assert main(["plot", str(tmp_path), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"hf-pc: {json.loads(printed.out)['error']}\n"
    with pytest.raises(SystemExit) as stopped:
        main(["plot", "--json"])
    assert stopped.value.code == 2
    assert "required: run" in json.loads(capsys.readouterr().out)["error"]


def test_plot_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no PNG's would be written elsewhere or as something else: it is refused. So is a step that is no
    number."""
    log = tmp_path / "trainer_state.json"
    log.write_text('{"log_history": [{"step": 1, "loss": 1.0}]}')
    for name in ("a", "a.gif", "."):
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / name)]) == 2
        assert "ends in .png is needed" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").is_file()
    log.write_text('{"log_history": [{"step": null}]}')
    assert main(["plot", str(tmp_path)]) == 2
    assert "holds no log history" in capsys.readouterr().err


def test_wrong_input_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too long, too short, weights that cannot be read, an adapter: one line, status 2."""
    make("gpt2").save_pretrained(tmp_path / "model")
    get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "adapter")
    make("gpt2").save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    for arguments, message in (
        (["doctor", "model", "--sequence", "64"], "--sequence 64 is over the 32 positions"),
        (["doctor", "model", "--sequence", "1"], "--sequence 1 is not allowed"),
        (["doctor", "broken"], ""),
        (["doctor", "model", "--auto_class", "AutoModel"], "returns no logits"),
        (["doctor", "adapter"], "is an adapter"),
        (["nodes", "adapter"], "is an adapter"),
    ):
        assert main([arguments[0], str(tmp_path / arguments[1]), *arguments[2:]]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("hf-pc: ")
        assert message in error


def test_nodes_of_a_mixture_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its shapes are known without weights too."""
    mixtral().config.save_pretrained(tmp_path)
    assert main(["nodes", str(tmp_path), "--json"]) == 0
    assert [row["shape"] for row in json.loads(capsys.readouterr().out)] == [[32], [32]]


def test_a_pass_that_fails_is_not_blamed_on_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names need no pass: without shapes, and without what only a pass could find."""
    make("gpt2").config.save_pretrained(tmp_path)
    monkeypatch.setattr("hf_pc.commands.nodes.smallest_input", lambda model: {"input_ids": None})
    assert main(["nodes", str(tmp_path), "--attention_energy", "gaussian", "--json"]) == 0
    assert [row["shape"] for row in json.loads(capsys.readouterr().out)] == [None] * 3


def test_doctor_of_a_classifier_that_reads_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BART's classifier wants one end of text in each sequence: the batch that is tried has it."""
    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    BartForSequenceClassification(config).save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path), "--sequence", "8", "--json"]) == 0
    assert "one end" not in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model's own code, which may need one."""

    def fail(args: object) -> None:
        raise ImportError("This modeling file requires the package einops")

    monkeypatch.setattr(COMMANDS["nodes"], "run", fail)
    assert main(["nodes", str(tmp_path), "--json"]) == 2
    assert "einops" in json.loads(capsys.readouterr().out)["error"]
