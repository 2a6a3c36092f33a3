"""Model cards: what they say, and that nothing a user writes can become metadata, markup or HTML."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from test_invariants import make

from hf_pc import PCConfig
from hf_pc.cards import MOST_NODES, write_card
from hf_pc.cli import main
from hf_pc.markup import escape, fenced, one_line
from hf_pc.provenance import command

ROOT = Path(__file__).parents[1]

FIGURES: dict[str, Any] = {
    "pc_eval_loss": 3.9, "pc_perplexity": 49.4, "bp_eval_loss": 4.0, "bp_perplexity": 54.6, "pc_step_seconds": 0.3,
    "bp_step_seconds": 0.1, "step_time_ratio": 3.0, "relaxed_fraction": 0.031, "residual": 0.0123,
    "regime": "equilibrium", "energies": {"output": 3.9, "h.0": 0.25, "h.1": 0.5},
    "command": "python examples/run_clm_pc.py --seed 1",
}  # fmt: skip
HOSTILE = [
    "a\n---\nlicense: mit\n---\n# b", "{{ 7 * 7 }} {% raw %}", "<script>alert(1)</script>", "`a` ``` b",
    "a | b |\n| c",
    "**a** _b_ [c](javascript:d) ![e](f)", "https://example.org www.example.org a@example.org", "&lt;b&gt; &amp;",
    "# a #",
    "- a\n- b\n1. c\n> d", "$a$ \\(b\\) \\", "<!-- a", "a: [b, {c}] # d", "'\"", "...", "!!python/object:os.system x",
    "\x00\u2028\u202e", "~~a~~ ==b==", "", " ", "---", "===", "*", "<a href=x", "][", "a\\", "|", "\\|",
    "[^1]", "```",
]  # fmt: skip


def card(folder: Path, text: str, results: dict[str, Any] = FIGURES) -> tuple[dict[str, Any], list[Any]]:
    """Metadata, and the tokens of the body, of a card with `text` wherever a user can write."""
    path = write_card(folder, PCConfig(), {**results, "regime": text, "energies": {text: 1.0}, "command": text},
                      model_name=text, base_model=text, dataset=text, dataset_id=text, notes=text)  # fmt: skip
    found = ModelCard(path.read_text(encoding="utf-8"))
    return found.data.to_dict(), MarkdownIt("commonmark", {"html": True}).enable("table").parse(found.text)


def shape(tokens: list[Any]) -> list[Any]:
    """The kinds of the tokens, those of lines included; what text says is left out, and so are its escapes."""
    kinds: list[Any] = []
    for token in tokens:
        kinds.append((token.type, token.tag))
        for child in token.children or []:
            if (child.type, child.tag) not in (("text", ""), ("text_special", "")) or kinds[-1] != ("text", ""):
                kinds.append(("text", "") if child.type == "text_special" else (child.type, child.tag))
    return kinds


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(
        st.sampled_from(HOSTILE), st.text(max_size=40), st.lists(st.sampled_from(HOSTILE), max_size=3).map("".join)
    )
)
@example("name")
def test_what_users_write_stays_text(text: str) -> None:
    """Whatever names, data sets and notes hold, the card has the same parts as with a word, and shows it as it is; its
    metadata has the same keys, and the strings in it are those given, on one line."""
    with tempfile.TemporaryDirectory() as folder:
        plain_data, plain_tokens = card(Path(folder), "word")
        data, tokens = card(Path(folder), text or "x")
    shown = one_line(text or "x")
    if not shown:  # nothing but blanks: parts that show nothing are left out
        assert data["model-index"][0]["name"] == "model"
        return
    assert shape(tokens) == shape(plain_tokens)
    assert {key for key in data if key not in ("base_model", "datasets")} == set(plain_data) - {
        "base_model",
        "datasets",
    }
    assert data["model-index"][0]["name"] == shown
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == shown
    assert data["tags"] == plain_data["tags"]
    heading = next(token for token in tokens if token.type == "inline")
    assert "".join(child.content for child in heading.children) == shown


@given(st.text())
def test_escapes(text: str) -> None:
    """Escaped text is one line; a block of code ends where it should, whatever it holds."""
    assert "\n" not in escape(text)
    block = MarkdownIt().parse(f"{fenced(one_line(text), 'sh')}\n\nafter")
    assert [token.type for token in block] == ["fence", "paragraph_open", "inline", "paragraph_close"]


def test_a_card_says_everything(tmp_path: Path) -> None:
    """Metadata for the Hub; figures of both sides, cost, regime, solver and sweeps, energy of every node, picture,
    command, limits, how to load it without hf_pc, and whom to cite."""
    (tmp_path / "learning.png").write_bytes(b"")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    path = write_card(tmp_path, PCConfig(sweeps=3), FIGURES, model_name="tiny", base_model="org/base",
                      dataset="Some text", dataset_id="org/text", notes="Mine.")  # fmt: skip
    found = ModelCard.load(path)
    data = found.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["base_model"] == "org/base"
    assert data["datasets"] == ["org/text"]
    assert data["metrics"] == ["perplexity"]
    assert data["tags"] == ["predictive-coding", "hf-pc"]
    assert data["pipeline_tag"] == "text-generation"
    assert data["model-index"][0]["results"][0]["metrics"] == [{"type": "perplexity", "value": 49.4}]
    for part in ("| perplexity | 49.40 | 54.60 |", "| validation loss, nats per label | 3.9000 | 4.0000 |",
                 "3.00 times",
                 "relaxed_fraction 0.031, residual 0.0123", 'Solver "error", 3 sweeps', "| h.0 | 0.25 |",
                 "| h.1 | 0.5 |\n| output | 3.9 |",
                 "](learning.png)", "python examples/run_clm_pc.py --seed 1", "## Limits", "Mine.", "org/base",
                 "from transformers import AutoModelForCausalLM, AutoTokenizer", "2211.03481",
                 "@inproceedings"):  # fmt: skip
        assert part in found.text, part


def test_a_card_of_many_nodes_and_of_none(tmp_path: Path) -> None:
    """Of many nodes the first, the last and some between are shown; what was not measured is not there."""
    many = FIGURES | {"energies": {f"h.{i}": 0.1 for i in range(100)}}
    text = write_card(tmp_path, PCConfig(), many, model_name="deep", base_model=None).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| h.")]
    assert len(rows) == MOST_NODES
    assert (rows[0], rows[-1]) == ("| h.0 | 0.1 |", "| h.99 | 0.1 |")
    assert f"{100 - MOST_NODES} nodes between these are left out" in text
    bare = write_card(tmp_path, PCConfig(sweeps=1), {}, model_name="bare", base_model=None).read_text(encoding="utf-8")
    assert not [
        part for part in ("## Figures", "Regime", "from scratch", "learning.png", "model-index") if part in bare
    ]
    assert "At one sweep predictive coding is backprop." in bare
    lost = write_card(tmp_path, PCConfig(), FIGURES | {"pc_perplexity": float("nan")}, model_name="a", base_model=None)
    assert "model-index" not in ModelCard.load(lost).data.to_dict()  # the Hub takes numbers alone


def test_a_folder_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    """A base model or data set that is a folder here is named in the text alone, without its path."""
    text = write_card(
        tmp_path, PCConfig(), FIGURES, model_name="a", base_model=str(tmp_path), dataset_id=str(tmp_path)
    )
    assert f"It started from {escape(tmp_path.name)}." in text.read_text(encoding="utf-8")
    assert str(tmp_path) not in text.read_text(encoding="utf-8")
    assert "base_model" not in ModelCard.load(text).data.to_dict()


def test_how_an_adapter_is_loaded(tmp_path: Path) -> None:
    """The card of an adapter names PEFT, and what it says of loading runs."""
    get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(tmp_path)
    text = write_card(tmp_path, PCConfig(), {}, model_name="a", base_model=None).read_text(encoding="utf-8")
    assert "library_name: peft" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")' in text


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["examples/run_clm_pc.py", "--seed", "1"], "python examples/run_clm_pc.py --seed 1"),
        (["/usr/bin/hf-pc", "compare", "m", "--train_file", "/home/me/a b"], "hf-pc compare m --train_file 'a b'"),
        (["x.py", "--hub_token", "abc", "--token=abc", "--lr", "1"], "python x.py --hub_token ... --token=... --lr 1"),
        (["x.py", "--token", "--lr", "1", "--tokenizer_name", "t"], "python x.py --token --lr 1 --tokenizer_name t"),
        (["x.py", "--out=/home/me/out"], "python x.py --out=out"),
        (["x.py", "--overrides", "p=/home/me,q=1"], "python x.py --overrides p=me,q=1"),
        (["x.py", "--fsdp_config", '{"a":"/home/me/x"}'], """python x.py --fsdp_config '{"a":"x"}'"""),
        (["x.py", "data/*/a.json", "C:/x/y", "</s>"], "python x.py 'data/*/a.json' C:/x/y '</s>'"),
        (["x.py", "--f=file:///home/me/x", "p=//s/x"], "python x.py --f=file://x p=x"),
        (["x.py", "--url", "https://a.b/c/d", "a/b/c"], "python x.py --url https://a.b/c/d a/b/c"),
        (["x.py", "--include_num_input_tokens_seen", "all"], "python x.py --include_num_input_tokens_seen all"),
        (["x.py", "--hub_tok", "hf_" + "a1B2" * 8], "python x.py --hub_tok ..."),
        (["/lib/hf_pc/cli.py", "compare", "m"], "hf-pc compare m"),
        (["-c"], None),
        (["/site-packages/pytest/__main__.py", "tests"], None),
        ([], None),
    ],
)  # fmt: skip
def test_the_command_of_a_run(argv: list[str], shown: str | None) -> None:
    """It can be run again, and gives away neither tokens nor folders of the machine."""
    assert command(argv) == shown


def test_the_command_writes_notes(tmp_path: Path) -> None:
    """`hf-pc card` takes the data set's repository and a paragraph of the user's."""
    PCConfig().save_pretrained(tmp_path)
    (tmp_path / "all_results.json").write_text(json.dumps(FIGURES))
    assert main(["card", str(tmp_path), "--dataset_id", "org/text", "--notes", "<b>Mine</b>"]) == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "&#60;b&#62;Mine" in text
    assert "from scratch" not in text  # which nothing tells of this run
    assert "- org/text" in text


def test_cards_of_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reference run has a card with its picture, figures of both sides, and the command that makes it again."""
    monkeypatch.syspath_prepend(str(ROOT / "model_cards"))
    make = importlib.import_module("make")
    assert {path.parent.name for path in (ROOT / "model_cards").glob("*/README.md")} == set(make.RUNS)
    for name, (script,) in make.RUNS.items():
        found = ModelCard.load(ROOT / "model_cards" / name / "README.md")
        assert found.data.to_dict()["model-index"][0]["name"] == name
        assert f"python {script} --output_dir runs/reference/{name} --report_to none" in found.text
        assert (ROOT / script).is_file()
        assert (ROOT / "model_cards" / name / "learning.png").read_bytes().startswith(b"\x89PNG")
        assert all(part in found.text for part in ("| backprop |", "Regime: ", "| node | energy", "## Limits"))
    with pytest.raises(SystemExit):
        make.main(["none"])
