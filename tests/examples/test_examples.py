"""The experiments, end to end at a size of seconds: what they print, what they leave, what they refuse."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, GPT2Config, GPT2LMHeadModel

from hf_pc import PCConfig, PCModel

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
import continual  # noqa: E402
import equilibrium  # noqa: E402
import few_samples  # noqa: E402
import finetune  # noqa: E402
import gradient_bias  # noqa: E402
import label_noise  # noqa: E402
import language  # noqa: E402
import likelihood  # noqa: E402
import marginal  # noqa: E402
import online  # noqa: E402
import paper_transformer  # noqa: E402
import peers  # noqa: E402
import run_classification_pc  # noqa: E402
import run_image_classification_pc  # noqa: E402
import run_lora_pc  # noqa: E402
import run_mlm_pc  # noqa: E402
import run_seq2seq_pc  # noqa: E402
import step_cost  # noqa: E402
import text_task  # noqa: E402
import toy_pc  # noqa: E402
import vae_pc  # noqa: E402
from language import Text, drawn  # noqa: E402

PNG = b"\x89PNG"


def test_toy(tmp_path: Path) -> None:
    """Every activation is learned by backprop and both kinds of PC, each with its regime; a figure is left."""
    results = toy_pc.main(["--output_dir", str(tmp_path), "--steps", "30", "--seeds", "2", "--sweeps", "4"])
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    assert (tmp_path / "toy.png").read_bytes().startswith(PNG)
    assert set(results) == {"relu", "tanh", "sigmoid", "softmax"}
    for found in results.values():
        assert set(found) == {"backprop", "PC, Gaussian", "PC, KL"}
        assert all(0 < facts["relaxed_fraction"] < 1 for name, facts in found.items() if name != "backprop")
        assert all("accuracy_spread" in facts for facts in found.values())
    assert results["relu"]["PC, Gaussian"]["accuracy"] > 0.5


def test_vae(tmp_path: Path) -> None:
    """The autoencoder learns by each method; reconstructions, samples and the bound are left."""
    results = vae_pc.main(["--output_dir", str(tmp_path), "--steps", "60", "--seeds", "1", "--latent", "4"])
    for name in ("reconstructions.png", "samples.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    for facts in results.values():
        assert facts["reconstruction"] < facts["negative_elbo"] < 45  # 64 log 2 = 44.4 is a coin for each pixel
    assert results["PC, Gaussian"]["relaxed_fraction"] > 0.02


def test_paper_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line per seed and one per method, with the rate that validation chose and the regime."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(600)) + "\n")
    size = [
        "--hidden",
        "16",
        "--vocabulary",
        "300",
        "--sequence",
        "16",
        "--batch",
        "4",
        "--steps",
        "3",
        "--seeds",
        "2",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    every = list(paper_transformer.methods(argparse.Namespace(sweeps=2, relaxed_fraction=0.1, precisions=[1.0])))
    rates = ["--learning_rates", "1e-3", "2e-3"]
    found = paper_transformer.main(["--train_file", str(text), *size, *rates, "--methods", *every])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 * 3
    assert (tmp_path / "out" / "learning.png").read_bytes().startswith(PNG)
    assert [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()] == found
    assert [line["method"] for line in found] == list(dict.fromkeys(line["method"] for line in lines))
    for line in found:
        assert set(line["validation_loss_by_rate"]) == {"0.001", "0.002"}
        assert line["method"] == "backprop" or 0 < line["relaxed_fraction"] < 1
    with pytest.raises(ValueError, match="--methods pc_lk is unknown"):
        paper_transformer.main(["--train_file", str(text), *size, "--methods", "pc_lk"])


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("t5", "d_model=16,d_kv=8,d_ff=16,num_layers=2,num_decoder_layers=2,num_heads=2,dropout_rate=0.0"),
        ("bart", "d_model=16,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=16,decoder_ffn_dim=16,dropout=0.0"),
    ],
)
def test_seq2seq(tmp_path: Path, kind: str, overrides: str) -> None:
    """An encoder-decoder learns pairs from a file by PC and by backprop, and leaves what run_clm_pc.py leaves."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"source": f"f{i}(a, b={i})", "target": f"Add {i} to a."}) for i in range(60)]
    pairs.write_text("\n".join(rows))
    out = tmp_path / "out"
    results = run_seq2seq_pc.main(
        ["--train_file", str(pairs), "--model_type", kind, "--config_overrides", overrides, "--max_steps", "3",
         "--logging_steps", "1", "--output_dir", str(out), "--report_to", "none", "--disable_tqdm", "true"]
    )  # fmt: skip
    assert {"pc_perplexity", "bp_perplexity", "step_time_ratio", "regime"} <= set(results)
    assert results["relaxed_fraction"] > 0
    for name in ("model.safetensors", "tokenizer.json", "pc_config.json", "README.md", "learning.png"):
        assert (out / name).is_file()
    assert "AutoModelForSeq2SeqLM" in (out / "README.md").read_text()


def test_seq2seq_reads_the_standard_library() -> None:
    """The default pairs are many, and are signatures with the first line of their docstring."""
    pairs = run_seq2seq_pc.load_pairs(run_seq2seq_pc.Arguments())
    sources = [*pairs["train"]["source"], *pairs["validation"]["source"]]
    assert len(sources) > 2000
    assert "textwrap dedent(text)" in sources


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    """Numbers and files that cannot be: one error with the name, before anything runs."""
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    for call, flags, message in (
        (toy_pc.main, ["--seeds", "0"], "--seeds 0"),
        (vae_pc.main, ["--latent", "0"], "--latent 0"),
        (run_seq2seq_pc.main, ["--model_type", "gpt"], "allowed: t5, bart"),
        (run_seq2seq_pc.main, ["--train_file", str(tmp_path / "bad.jsonl")], "'source' and 'target' are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            call([*flags, "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_equilibrium(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Backprop and every rule at every target, each with regime and step time; unknown characters are no error."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(100)) + "\n" + "zebra! " * 60)
    size = ["--hidden", "16", "--layers", "2", "--heads", "2", "--sequence", "16", "--batch", "4", "--steps", "3"]
    size += ["--output_dir", str(tmp_path / "out")]
    size += ["--seeds", "1", "--learning_rates", "1e-3", "--relaxed_fractions", "0.1"]
    given = ["--train_file", str(text), *size]
    found = equilibrium.main(given)
    assert len(capsys.readouterr().out.splitlines()) == 2 * 11
    assert [line["method"] for line in found] == [
        "backprop", "plain_0.1", "centred_0.1", "extrapolated_0.1", "mirrored_0.1", "balanced_0.1",
        "one_sided_0.1", "wake_sleep_0.1", "state_0.1", "lagrangian_0.1", "incremental_0.1",
    ]  # fmt: skip
    assert all(line["step_time_ratio"] > 1 and line["residual"] > 0 for line in found[1:])
    assert found[2]["settings"] == {"learning": "centred", "relaxed_fraction": 0.1}
    with monkeypatch.context() as inside:  # what was trained is not trained again, whatever else is asked
        inside.setattr(language, "train", None)
        again = equilibrium.main([*given, "--methods", "backprop", "plain_0.1", "--relative_stds", "1"])
    assert [line["mean"] for line in again] == [line["mean"] for line in found[:2]]
    assert (again[1]["residual"], again[1]["regime"]) == (found[1]["residual"], found[1]["regime"])
    one_sided = ["--methods", "one_sided_0.1", "--strengths", "1", "0.25", "--anderson_depth", "3"]
    (one,) = equilibrium.main([*given, *one_sided])
    assert one["settings"]["strengths"] == [1.0, 0.25]
    assert one["settings"]["anderson_depth"] == 3
    with pytest.raises(ValueError, match="there is no such file"):
        equilibrium.main(["--train_file", str(tmp_path / "none.txt")])


@pytest.mark.parametrize("script", [online, label_noise, few_samples, continual])
def test_on_small_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Any) -> None:
    """Each script compares backprop with three regimes, over seeds, with an interval or a spread."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    size = ["--hidden", "16", "--layers", "1", "--heads", "2", "--sequence", "8", "--steps", "4", "--seeds", "2"]
    size += ["--learning_rates", "1e-3"] + ([] if script is continual else ["--output_dir", str(tmp_path / "out")])
    found = script.main(["--train_file", str(text), *size])
    assert len(capsys.readouterr().out.splitlines()) == 4 * 3
    assert [line["method"] for line in found] == ["backprop", "plain_0.03", "plain_0.1", "balanced_0.1"]
    assert all(line["relaxed_fraction"] > 0 and line["regime"] for line in found[1:])
    for line in found[1:]:
        assert "forgotten_nats_spread" in line or len(line["over_backprop"]["interval"]) == 2


def test_noise_is_in_the_targets_alone() -> None:
    """A fifth of the targets is replaced, the inputs are those of clean training."""
    text = Text(torch.arange(5000) % 40, torch.arange(0), torch.arange(0), 40)
    args = argparse.Namespace(sequence=32, batch=8, steps=20, noise=0.2)
    pairs = list(zip(label_noise.noisy(text, args, 3), drawn(text, args, 3), strict=True))
    assert all(torch.equal(noisy["input_ids"], clean["input_ids"]) for noisy, clean in pairs)
    wrong = torch.stack([noisy["labels"] != clean["labels"] for noisy, clean in pairs]).double().mean()
    assert float(wrong) == pytest.approx(0.2 * 39 / 40, abs=0.02)


STEP = ["--layers", "2", "--hidden", "16", "--sequence", "8", "--batch", "2", "--vocab", "50", "--runs", "2"]


@pytest.mark.parametrize(
    ("sweeps", "more"),
    [(["1", "3"], ["--optimizer", "--checkpointing"]), (["3"], ["--solver", "state"]), (["3"], ["--compile"])],
    ids=str,
)
def test_step_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sweeps: list[str], more: list[str]
) -> None:
    """One JSON line per T with time over backprop's, its limit, memory and the regime; and what was asked for."""
    monkeypatch.setattr("sys.argv", ["step_cost.py", *STEP, *more, "--sweeps", *sweeps])
    here = step_cost.measured_memory
    monkeypatch.setattr(
        step_cost, "memory", lambda args, count, checkpointed=False: 1 + here(args, count, checkpointed)
    )
    step_cost.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["sweeps"] for line in lines] == [int(count) for count in sweeps]
    assert all(line["time_ratio"] > 0 and line["memory_ratio"] > 0 for line in lines)
    assert [line["limit"] for line in lines] == [1.0, 2.333][-len(sweeps) :]
    assert all(line["over_passes"] == line["over_limit"] for line in lines if line["sweeps"] == 1)  # no pass but BP's
    assert all(0 < line["sweep_ratio"] < 10 for line in lines)
    assert all(("time_ratio_compiled" in line) == ("--compile" in more) for line in lines)
    assert all(("memory_ratio_checkpointed" in line) == ("--checkpointing" in more) for line in lines)


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a step over the built model, in bytes: logits and activations at least."""
    monkeypatch.setattr("sys.argv", ["step_cost.py", *STEP, "--sequence", "512", "--batch", "8"])
    assert step_cost.memory(step_cost.parse(), 2) > 8 * 512 * 50 * 4


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """Without peers a line says so of each; hf_pc's say how far T updates came, and more of them come further."""
    lines = peers.main(["--sizes", "12", "8", "8", "3", "--batch", "4", "--runs", "2", "--T", "1", "12"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert [line["library"] for line in lines[:2]] == ["fabricpc", "pcx"]
    assert all(line == line | {"measured": False, "reason": "no --peer_python was given"} for line in lines[:2])
    ways = [("errors", 0.1), ("states", 0.1), ("errors", "auto")]
    found = {(line["coordinates"], line["step_size"], line["T"]): line for line in lines[2:]}
    assert list(found) == [(*way, updates) for way in ways for updates in (1, 12)]
    for line in found.values():
        assert (line["library"], line["runs"], line["threads"], line["seed"]) == ("hf_pc", 2, 1, 0)
        assert set(line["versions"]) == {"python", "hf_pc", "torch"}
        assert line["time_ratio_quartiles"][0] <= line["time_ratio"] <= line["time_ratio_quartiles"][1]
        assert line["step_ms"] > 0 < line["backprop_ms"]
        assert -1 <= line["gradient_cosine"] <= 1
    relaxed = {kind: line["relaxed"] for kind, line in found.items()}
    assert all(0 <= relaxed[(*way, 1)] < relaxed[(*way, 12)] <= 1 for way in ways)
    assert relaxed["states", 0.1, 12] < relaxed["errors", 0.1, 12]
    assert relaxed["errors", "auto", 12] > 0.99


@pytest.mark.parametrize(
    ("name", "value"),
    [("sizes", "8"), ("runs", "1"), ("step_size", "nan"), ("T", "0"), ("seed", "-1"), ("peer_python", "none")],
)
def test_peers_refuses(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    """Bad input ends with an error that names the argument, before any work."""
    with pytest.raises(SystemExit, match="2"):
        peers.main([f"--{name}", value])
    assert f"argument --{name}: " in capsys.readouterr().err


TASKS = {
    "classification": (run_classification_pc, ["--max_train_samples", "64"], "accuracy"),
    "lora": (run_lora_pc, ["--max_train_samples", "64"], "accuracy"),
    "mlm": (run_mlm_pc, ["--max_train_samples", "32", "--max_eval_samples", "8"], "perplexity"),
    "images": (run_image_classification_pc, [], "accuracy"),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_learn_as_backprop_does_at_one_sweep(tmp_path: Path, name: str) -> None:
    """At T = 1 every task's two sides see the same batches and end alike; checkpoint, figures and card are left."""
    script, few, metric = TASKS[name]
    short = ["--max_steps", "3", "--sweeps", "1", "--disable_tqdm", "true", "--report_to", "none"]
    results = script.main(["--output_dir", str(tmp_path), *short, *few])
    assert results["pc_eval_loss"] == pytest.approx(results["bp_eval_loss"], rel=1e-4)
    assert results[f"pc_{metric}"] == pytest.approx(results[f"bp_{metric}"], rel=1e-3)
    assert (tmp_path / "learning.png").read_bytes().startswith(PNG)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| {metric} |" in card
    saved = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert (tmp_path / saved).is_file()


def test_an_adapter_alone_learns_and_loads_with_plain_peft(tmp_path: Path) -> None:
    """The saved adapter merges into the untouched base model with plain PEFT, and gives what was evaluated."""
    base = tmp_path / "base"
    short = ["--max_steps", "2", "--disable_tqdm", "true", "--report_to", "none", "--max_train_samples", "64"]
    run_classification_pc.main(["--output_dir", str(base), *short, "--compare_bp", "false"])
    given = ["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "lora"), "--learning_rate", "0.01"]
    results = run_lora_pc.main([*given, *short, "--compare_bp", "false"])
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    before = {name: value.clone() for name, value in plain.named_parameters()}
    adapted = PeftModel.from_pretrained(plain, tmp_path / "lora")
    frozen = {name.replace(".base_layer", ""): value for name, value in plain.named_parameters()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items() if not name.startswith("classifier"))
    merged = adapted.merge_and_unload().eval()
    args = text_task.TextArguments(model_name_or_path=str(base), max_train_samples=64)
    data = text_task.load(args)
    rows = text_task.options(args, data, text_task.tokenizer_of(args, data))["eval_dataset"]
    collate = DataCollatorWithPadding(text_task.tokenizer_of(args, data))
    inputs = collate([{key: row[key] for key in ("input_ids", "attention_mask", "label")} for row in rows])
    with torch.no_grad():
        assert merged(**inputs).loss.item() == pytest.approx(results["pc_eval_loss"], rel=1e-4)


def test_finetune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint is fine-tuned by each method; accuracy is that of text which neither trained nor chose the rate."""
    base = tmp_path / "base"
    short = ["--max_steps", "1", "--disable_tqdm", "true", "--report_to", "none", "--max_train_samples", "64"]
    run_classification_pc.main(["--output_dir", str(base), *short, "--compare_bp", "false"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"text": f"{'red' if i % 2 else 'blue'} {i}", "label": i % 2}) for i in range(90))
    )
    capsys.readouterr()
    size = ["--steps", "4", "--seeds", "2", "--learning_rates", "1e-3", "--batch", "4"]
    found = finetune.main(
        ["--model_name_or_path", str(base), "--train_file", str(rows), *size, "--methods", "backprop", "balanced_0.1"]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"method"')]
    assert len(lines) == 2 * 3
    assert found == [lines[2], lines[5]]
    assert found[0]["rows"] == {"train": 56, "validation": 9, "test": 25}
    assert all(0 <= line["test_accuracy"] <= 1 for line in found)
    assert found[1]["relaxed_fraction"] > 0


def test_gradient_bias(tmp_path: Path) -> None:
    """One line per choice of nodes and rule; the rules of higher order are nearer to backprop."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    size = ["--hidden", "16", "--layers", "2", "--heads", "2", "--sequence", "16", "--batch", "4", "--steps", "20"]
    found = gradient_bias.main(
        ["--train_file", str(text), *size, "--batches", "2", "--nodes", "block", "transformer.h.1"]
    )
    assert [line["nodes"] for line in found] == ["block"] * 3 + ["transformer.h.1"] * 3
    for plain, centred, extrapolated in (found[:3], found[3:]):
        assert plain["distance"] > centred["distance"] > extrapolated["distance"] > 0
        assert plain["relaxed_fraction"] == pytest.approx(0.1, rel=0.2)
    for line in found:  # what each phase carries of backprop's gradient adds up to it
        assert sum(phase["share"] for phase in line["phases"]) == pytest.approx(1)
        assert line["phases"][0]["relaxed_fraction"] == pytest.approx(line["relaxed_fraction"], rel=0.01)


def test_strengths_of_gradient_bias(tmp_path: Path) -> None:
    """Other strengths than the rule's own are those of the phases; what takes none refuses them before it trains."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    size = ["--hidden", "16", "--layers", "1", "--heads", "2", "--sequence", "16", "--batch", "4", "--steps", "2"]
    given = ["--train_file", str(text), *size, "--batches", "1", "--strengths", "1", "0.25"]
    (found,) = gradient_bias.main([*given, "--rules", "one_sided", "--anderson_depth", "2"])
    assert found["anderson_depth"] == 2
    assert [phase["strength"] for phase in found["phases"]] == [1.0, 0.25]
    with pytest.raises(ValueError, match="those of one_sided, which is not among --rules"):
        gradient_bias.main([*given, "--rules", "plain"])
    with pytest.raises(
        ValueError, match=r"none\.txt: there is no such file"
    ):  # what is wrong with the text comes later
        gradient_bias.main([*given[2:], "--train_file", str(tmp_path / "none.txt"), "--rules", "one_sided"])
    with pytest.raises(ValueError, match=r"PCConfig\.strengths"):
        gradient_bias.main(["--train_file", str(tmp_path / "none.txt"), "--rules", "one_sided", "--strengths", "1"])


def test_marginal_likelihood_is_the_mean_over_errors() -> None:
    """Importance sampling around the equilibrium finds what the mean of p(y|e) over all errors is."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=2, n_head=2, initializer_range=0.3)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 11, (2, 4))
    batch = {"input_ids": ids, "labels": ids}
    pc = PCModel(model, PCConfig(relative_std=0.7, sweeps=20))
    pc.accumulate_grad(**batch)
    pc.steer()
    model.zero_grad()
    found, nats, free_energy = marginal.likelihood(model, pc, batch, 8000, torch.Generator().manual_seed(1))
    spreads = [precision**-0.5 for precision in marginal.precisions(pc)]
    total = torch.zeros((), dtype=torch.float64)
    for row in ids:
        errors = [spread * torch.randn(8000, 4, 8, dtype=torch.float64) for spread in spreads]
        with marginal.with_errors(model, errors):
            logits = model(input_ids=row.expand(8000, -1)).logits
        told = logits.log_softmax(-1)[:, :-1].gather(-1, row[1:].expand(8000, -1)[..., None]).sum((1, 2))
        total = total - (told.logsumexp(0) - math.log(8000)) / 6
    total.backward()
    expected = gradient_bias.gradient_of(model)
    assert nats == pytest.approx(total.item(), rel=0.01)
    assert abs(nats - free_energy) > 0.05  # it is another thing than F
    assert (found - expected).norm() / expected.norm() < 0.1


def test_marginal(tmp_path: Path) -> None:
    """For each target the losses and a line per gradient, in units of backprop's; one_sided is next to that."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    size = ["--steps", "20", "--batch", "2", "--batches", "2", "--samples", "64", "--draws", "2", "--sweeps", "6"]
    lines = marginal.main(["--train_file", str(text), *size, "--relaxed_fractions", "0.1"])
    assert set(lines[0]["losses"]) == {"mean_pass", "marginal", "free_energy"}
    assert lines[0]["losses"]["free_energy"] < lines[0]["losses"]["mean_pass"]
    found = {line["gradient"]: line for line in lines}
    assert list(found) == ["backprop", "marginal", "plain", "centred", "one_sided", "wake_sleep", "langevin"]
    assert found["backprop"]["norm"] == pytest.approx(1)
    assert found["plain"]["relaxed_fraction"] == pytest.approx(0.1, rel=0.2)
    assert found["marginal"]["to_marginal"] == 0 < found["marginal"]["to_backprop"]
    assert found["one_sided"]["to_backprop"] < 0.01 < found["plain"]["to_backprop"]


def test_likelihood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For each method a line per seed and their means: both losses, and both over backprop's with the same seeds."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    size = ["--steps", "5", "--batch", "2", "--batches", "2", "--samples", "32", "--sweeps", "3", "--seeds", "2"]
    size += ["--backprop_steps", "3"]
    found = likelihood.main(["--train_file", str(text), *size, "--learning_rates", "1e-3", "--relative_std", "0.3"])
    seeds = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if "seed" in line]
    assert [line["method"] for line in found] == ["backprop", "plain", "one_sided", "wake_sleep", "langevin"]
    assert len(seeds) == 2 * len(found)
    for line, pair in zip(found, zip(seeds[::2], seeds[1::2], strict=True), strict=True):
        for measure in ("mean_pass", "marginal"):
            assert line[measure] == pytest.approx(sum(seed[measure] for seed in pair) / 2)
            gaps = [mine[measure] - its[measure] for mine, its in zip(pair, seeds[:2], strict=True)]
            over = line[f"{measure}_over_backprop"]
            assert over is None if line is found[0] else over["nats"] == pytest.approx(sum(gaps) / 2)
    with pytest.raises(ValueError, match=r"relative_std=0\.0 is not allowed"):
        likelihood.main(["--train_file", str(tmp_path / "none.txt"), "--relative_std", "0"])
