"""What SECURITY.md guarantees, where no other file holds it already."""

from __future__ import annotations

import ast
import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from test_invariants import make
from test_trainer import rows, trainer
from transformers import AutoModelForCausalLM

from hf_pc import PCConfig, PCModel
from hf_pc.hub import explained

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "hf_pc").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    PCModel(make("gpt2"), PCConfig()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_that_are_a_pickle_run_nothing(saved: Path, tmp_path: Path) -> None:
    """A repository whose weights are a pickle with a call in it is refused; the call is not made."""
    (saved / "model.safetensors").unlink()
    for data in (pickle.dumps(Bomb(tmp_path / "ran")), None):
        if data is None:
            torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, saved / "pytorch_model.bin")
        else:
            (saved / "pytorch_model.bin").write_bytes(data)
        with pytest.raises((pickle.UnpicklingError, OSError, ValueError, RuntimeError)):
            PCModel.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_repository_runs_by_your_flag_alone(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that brings code is refused, whatever its files say of trust_remote_code; the code is not imported."""
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # transformers asks on a terminal
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (saved / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    config = json.loads((saved / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    for kind in ("gpt2", "unknown"):
        changed = config | {"model_type": kind, "auto_map": own, "trust_remote_code": True}
        (saved / "config.json").write_text(json.dumps(changed))
        if kind == "unknown":
            with pytest.raises(ValueError, match="trust_remote_code"):
                PCModel.from_pretrained(saved)
        else:  # known to transformers, whose own class is taken
            assert type(PCModel.from_pretrained(saved).model).__module__.startswith("transformers.")
    (saved / "pc_config.json").write_text(json.dumps({"trust_remote_code": True}))
    with pytest.raises(ValueError, match="no field 'trust_remote_code'"):
        PCConfig.from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_pickles_runs_nothing(tmp_path: Path) -> None:
    """Resuming reads optimizer and random state without calling what a pickle names; training_args.bin not at all."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path / "run", max_steps=2, **saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    torch.save(Bomb(tmp_path / "ran"), checkpoint / "training_args.bin")
    trainer(tmp_path / "again", **saving).train(resume_from_checkpoint=str(checkpoint))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        torch.save(Bomb(tmp_path / "ran"), checkpoint / name)
        with pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError)):
            trainer(tmp_path / "again", **saving).train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_evaluates_or_unpickles(path: Path) -> None:
    """No eval, exec, pickle, shell, or YAML that builds objects; torch.load with weights_only; code is trusted by
    an argument of the user's alone."""
    banned = {"eval", "exec", "__import__", "system", "popen", "unsafe_load"}
    for call in calls(path):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in banned or (name == "eval" and owner), ast.unparse(call)  # model.eval() is another matter
        assert owner not in ("pickle", "marshal", "shelve", "joblib", "dill")
        assert "shell" not in given
        if (owner, name) == ("torch", "load"):
            assert given["weights_only"] == "True"
        if owner == "yaml":
            assert name.startswith("safe_") or name == "dump" or "Safe" in given.get("Loader", "")
        assert given.get("trust_remote_code", "args.trust_remote_code") == "args.trust_remote_code"


def test_tokens_are_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token given to a run or a push is in no file of it, no log, no output and no error."""
    token = "hf_" + "SecretSecretSecretSecretSecret"
    with caplog.at_level(logging.DEBUG):
        run = trainer(tmp_path, max_steps=1, hub_token=token, save_strategy="steps", save_steps=1)
        run.train()
        run.save_model()
        run.create_model_card(dataset="data", model_name="name")
        assert run.args.hub_token == copy.deepcopy(run.args).hub_token == token
        with pytest.raises(PermissionError) as told, explained("user/model", token):
            raise HfHubHTTPError("denied", response=_Denied())  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert not any(token in text for text in (caplog.text, shown.out, shown.err, str(told.value)))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


class _Denied:
    status_code, headers, request = 403, {}, None


HOSTILE = ["../../x", "a/b\n---\nlicense: mit", "<script>", "$(touch ran)", "`id`", "](http://x)", "a\x00b", "\u202e"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_repositories(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository of a hostile name is not found, by an error of the usual kind; nothing is made anywhere."""
    monkeypatch.chdir(tmp_path)
    for load in (PCConfig.from_pretrained, PCModel.from_pretrained):
        with pytest.raises((OSError, ValueError)):
            load(name)
    assert not list(tmp_path.iterdir())


def test_plain_weights_need_none_of_this(saved: Path) -> None:
    """What is saved here is safetensors and JSON only, and loads with transformers alone."""
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(saved).eval()
    assert torch.equal(loaded(ids).logits, PCModel.from_pretrained(saved).model.eval()(ids).logits)
