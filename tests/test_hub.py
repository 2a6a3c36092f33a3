"""Pushes and loads through the real huggingface_hub client, against a local stand-in of the Hub.

HF_ENDPOINT is read when huggingface_hub is imported, so each side is a process of its own; all of them have the same
stand-in and the same HF_HOME, which every test finds empty.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard
from preloaded import Preloaded

ROOT = Path(__file__).parents[1]
SMALL = "n_layer=2,n_embd=16,n_head=2,n_positions=32"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def environment(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes whose Hub is the stand-in, without a token."""
    own = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    home = str(tmp_path_factory.mktemp("home"))
    return {**own, "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "HF_HOME": home,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def preloaded(environment: dict[str, str]) -> Iterator[Preloaded]:
    with Preloaded(environment) as started:
        yield started


@pytest.fixture
def hub(server: Hub, environment: dict[str, str]) -> Hub:
    """The stand-in with no repositories, of which nobody has kept anything."""
    server.clear()
    shutil.rmtree(environment["HF_HOME"], ignore_errors=True)
    return server


@pytest.fixture
def python(hub: Hub, environment: dict[str, str], preloaded: Preloaded, tmp_path: Path) -> Run:
    """Runs a file or `-c code` in a process whose Hub is the stand-in."""

    def run(*args: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        own = environment | ({"HF_TOKEN": token} if token else {})
        return preloaded.run(*args, environment=own, cwd=tmp_path)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")
    return path


def flags(text: Path, out: Path) -> list[str]:
    """Of run_clm_pc.py, for a run of seconds."""
    return ["--train_file", str(text), "--block_size", "32", "--config_overrides", SMALL, "--max_steps", "4",
            "--output_dir", str(out), "--report_to", "none", "--use_cpu"]  # fmt: skip


@pytest.fixture
def example(python: Run, text: Path, tmp_path: Path) -> Run:
    """Runs run_clm_pc.py on a small text, pushing to user/tiny."""

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        pushing = ["--push_to_hub", "--hub_model_id", "user/tiny"]
        return python(str(ROOT / "examples" / "run_clm_pc.py"), *flags(text, tmp_path / "out"), *pushing, *more)

    return run


def test_the_example_pushes(hub: Hub, python: Run, example: Run) -> None:
    """`--push_to_hub` leaves a repository with card, figures and pc_config.json, loaded with and without hf_pc."""
    done = example()
    assert done.returncode == 0, done.stderr
    files = hub.repos["user/tiny"].files("main")
    assert files is not None
    assert {"model.safetensors", "config.json", "tokenizer.json", "pc_config.json", "README.md", "all_results.json",
            "learning.png"} <= set(files)  # fmt: skip
    assert {path for path in files if path.endswith((".bin", ".pt", ".pth"))} <= {"training_args.bin"}  # the Trainer's
    assert b"| validation loss" in files["README.md"]
    load = (
        "import sys, torch; sys.modules['hf_pc'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('user/tiny')\n"
        "ids = AutoTokenizer.from_pretrained('user/tiny')('line 7', return_tensors='pt')['input_ids']\n"
        "assert model(ids).logits.isfinite().all()\n"
    )
    assert (plain := python("-c", load)).returncode == 0, plain.stderr
    ours = "from hf_pc import PCModel; assert PCModel.from_pretrained('user/tiny').config.sweeps == 3"
    assert (loaded := python("-c", ours, token=None)).returncode == 0, loaded.stderr


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_pushes_while_training(hub: Hub, example: Run, strategy: str) -> None:
    """Every hub_strategy pushes, and the repository holds pc_config.json whatever it pushed."""
    done = example("--hub_strategy", strategy, "--save_steps", "2", "--hub_always_push", "--no_compare_bp")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["user/tiny"]
    assert all("pc_config.json" in files for files in repo.commits.values() if "model.safetensors" in files)
    on_the_way = [files for files in repo.commits.values() if "model.safetensors" in files]
    assert strategy == "end" or all("pc_state.json" in files for files in on_the_way)
    if strategy == "checkpoint":
        assert "last-checkpoint/pc_state.json" in (repo.files("main") or {})


def test_pcmodel_push_and_revision(hub: Hub, python: Run) -> None:
    """PCModel.push_to_hub makes a private repository; it is read back by revision, with the token only."""
    push = (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "from hf_pc import PCConfig, PCModel\n"
        "model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64))\n"
        "for sweeps in (2, 4):\n"
        "    pc = PCModel(model, PCConfig(sweeps=sweeps))\n"
        "    print(pc.push_to_hub('user/secret', private=True).oid)\n"
        "    pc.detach()\n"
    )
    done = python("-c", push)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.split()
    assert hub.repos["user/secret"].private
    load = "from hf_pc import PCModel; print(PCModel.from_pretrained('user/secret', revision={!r}).config.sweeps)"
    assert python("-c", load.format(first)).stdout.strip() == "2"
    assert python("-c", load.format(last)).stdout.strip() == "4"
    refused = python("-c", load.format("main"), token=None)
    assert refused.returncode != 0
    assert "user/secret" in refused.stderr


#: pushes of one process, each of which says how it ended; `lose` asks the stand-in for lost connections
PUSH = """
import os, time, urllib.request
time.sleep = lambda seconds: None  # the client waits between its attempts
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2LMHeadModel
from hf_pc import PCConfig, PCModel

def lose(action, when, count):
    url = f"{os.environ['HF_ENDPOINT']}/lose/{action}/{when}/{count}"
    urllib.request.urlopen(urllib.request.Request(url, method="POST"))

def attempt(call, *args, **given):
    try:
        call(*args, **given)
    except (Exception, SystemExit) as error:  # the latter of an example
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        print("done")

size = dict(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0)
pc = PCModel(GPT2LMHeadModel(GPT2Config(**size)), PCConfig(sweeps=2))
"""
WHOLE = {"model.safetensors", "config.json", "pc_config.json", "README.md"}


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_connection_lost_in_a_push(hub: Hub, python: Run) -> None:
    """What is lost for good is one clear error, after which the repository holds the whole commit or nothing of it,
    the model is what it was, and the next push succeeds. What is lost once is tried again by the client."""
    code = """
before = {name: value.clone() for name, value in pc.model.state_dict().items()}
for action, when, count in (("create", "before", 99), ("commit", "before", 99), ("commit", "after", 99),
                            ("commit", "before", 1)):
    repo = f"user/{action}-{when}-{count}"
    lose(action, when, count)
    attempt(pc.push_to_hub, repo)
    lose(action, when, 0)
    print(*(HfApi().list_repo_files(repo) if HfApi().repo_exists(repo) else []))
    attempt(pc.push_to_hub, repo)
assert all(value.equal(before[name]) for name, value in pc.model.state_dict().items())
assert len(pc.nodes) == 2
"""
    found = lines(python("-c", PUSH + code))
    for kind, lost, held, again in zip(("none", "none", "whole"), found[::3], found[1::3], found[2::3], strict=False):
        assert lost.startswith("ConnectionError the connection was lost while pushing to user/")
        assert lost.endswith("push again")
        assert set(held.split()) >= WHOLE if kind == "whole" else not held
        assert again == "done"
    assert found[9] == "done"
    assert set(found[10].split()) >= WHOLE
    assert all(set(repo.files("main") or {}) >= WHOLE for repo in hub.repos.values())
    assert len(hub.repos) == 4


def test_a_training_run_whose_push_is_lost(hub: Hub, python: Run, text: Path, tmp_path: Path) -> None:
    """The checkpoint on disk is whole when the pushes of a run fail, and can be pushed later."""
    out, example = tmp_path / "out", ROOT / "examples" / "run_clm_pc.py"
    argv = [str(example), *flags(text, out), "--push_to_hub", "--hub_model_id", "user/tiny", "--no_compare_bp"]
    code = f"""
import runpy, sys
sys.path.insert(0, {str(example.parent)!r})
sys.argv = {argv!r}
lose("commit", "before", 99)
attempt(runpy.run_path, sys.argv[0], run_name="__main__")
lose("commit", "before", 0)
attempt(HfApi().upload_folder, repo_id="user/tiny", folder_path={str(out)!r})
"""
    found = [line for line in lines(python("-c", PUSH + code)) if line.startswith(("done", "R", "C", "S"))]
    assert len(found) == 2
    assert found[0].startswith("SystemExit error: the connection was lost while pushing to user/tiny")
    assert found[1] == "done"
    files = hub.repos["user/tiny"].files("main") or {}
    assert set(files) >= WHOLE | {"all_results.json", "learning.png", "tokenizer.json"}
    assert all(files[path.name] == path.read_bytes() for path in out.iterdir() if path.is_file())


def test_what_is_refused(hub: Hub, python: Run) -> None:
    """Pushes with a wrong token, with none, to no branch; loads of no repository, no revision, a private repository
    without its token: each is named, with what would do."""
    code = f"""
attempt(pc.push_to_hub, "user/tiny", token="hf_wrong")
attempt(pc.push_to_hub, "user/tiny")
attempt(pc.push_to_hub, "user/tiny", token={TOKEN!r}, private=True)
attempt(pc.push_to_hub, "user/tiny", token={TOKEN!r}, revision="v9")
attempt(PCModel.from_pretrained, "user/none", token={TOKEN!r})
attempt(PCModel.from_pretrained, "user/tiny", token={TOKEN!r}, revision="v9")
attempt(PCModel.from_pretrained, "user/tiny", token="hf_wrong")
attempt(PCModel.from_pretrained, "user/tiny", token={TOKEN!r})
"""
    wrong, none, right, branch, repo, revision, token, loaded = lines(python("-c", PUSH + code, token=None))
    assert wrong.startswith("PermissionError user/tiny cannot be written to with this token: give a token=")
    assert none.startswith("PermissionError user/tiny cannot be written to with the token of this machine, if any")
    assert branch.startswith("FileNotFoundError revision='v9': user/tiny has no such branch")
    assert repo.startswith("OSError user/none is not a local folder")
    assert revision.startswith("OSError v9 is not a valid git identifier")
    assert token.startswith("OSError user/tiny is not a local folder")
    assert right == loaded == "done"


def test_an_adapter_and_the_cards_of_pushes(hub: Hub, python: Run) -> None:
    """A push leaves a card with tags, settings and how to load it, and keeps one that is there. An adapter goes up
    without its base model and gives the same logits through PCModel and, with no hf_pc to import, plain PEFT."""
    code = """
import torch
from peft import LoraConfig, get_peft_model
pc.push_to_hub("user/base")
pc.detach()
base = GPT2LMHeadModel.from_pretrained("user/base")
config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
pc = PCModel(get_peft_model(base, config), PCConfig(sweeps=2))
pc.push_to_hub("user/adapter")
loaded = PCModel.from_pretrained("user/adapter")
assert len(loaded.nodes) == 2
for model in (pc.model, loaded.model):
    print(model.eval()(input_ids=torch.arange(8)[None]).logits.sum().item())
HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="user/adapter")
pc.push_to_hub("user/adapter")
"""
    plain = """
import sys, torch; sys.modules["hf_pc"] = None
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval()
print(model(input_ids=torch.arange(8)[None]).logits.sum().item())
"""
    logits = [float(line) for line in lines(python("-c", PUSH + code)) + lines(python("-c", plain))]
    assert logits == pytest.approx([logits[0]] * 3, rel=1e-5)
    card = ModelCard((hub.repos["user/base"].files("main") or {})["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["predictive-coding", "hf-pc"]
    assert card.data.pipeline_tag == "text-generation"
    assert 'AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY")' in card.text
    assert '"sweeps": 2' in card.text
    repo = hub.repos["user/adapter"]
    first = next(files for files in repo.commits.values() if files)
    assert {"adapter_model.safetensors", "adapter_config.json", "pc_config.json", "README.md"} <= set(first)
    assert "model.safetensors" not in first
    adapted = ModelCard(first["README.md"].decode())
    assert adapted.data.library_name == "peft"
    assert adapted.data.base_model == "user/base"
    assert {"predictive-coding", "hf-pc"} <= set(adapted.data.tags or [])
    assert (repo.files("main") or {})["README.md"] == b"mine"


def test_a_trainer_pushes_all_but_its_token(hub: Hub, python: Run) -> None:
    """A token given as an argument is in nothing that `push_to_hub=True` and `trainer.push_to_hub()` upload; the card
    has the last evaluation as a result; a wrong token is a PermissionError that does not repeat it."""
    code = f"""
import copy
from datasets import Dataset
from hf_pc import PCTrainer, PCTrainingArguments
rows = [[(i * j) % 64 for j in range(32)] for i in range(16)]
data = Dataset.from_dict({{"input_ids": rows, "labels": rows}})
pc.detach()

def trainer(token):
    args = PCTrainingArguments("out", max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, report_to=[],
                               use_cpu=True, push_to_hub=True, hub_model_id="user/run", hub_token=token,
                               hub_strategy="all_checkpoints", hub_always_push=True, disable_tqdm=True)
    return PCTrainer(model=pc.model, args=args, pc_config=pc.config, train_dataset=data, eval_dataset=data)

own = trainer({TOKEN!r})
assert own.args.hub_token == copy.deepcopy(own.args).hub_token == {TOKEN!r}
own.train()
attempt(own.push_to_hub)
attempt(lambda: trainer("hf_wrong").push_to_hub())
"""
    done = python("-c", PUSH + code, token=None)
    shown = [line for line in lines(done) if line.startswith(("done", "PermissionError", "Client"))]
    assert shown[0] == "done"
    assert shown[1].startswith("PermissionError user/run cannot be written to with this token")
    assert "hf_wrong" not in done.stdout + done.stderr
    commits = hub.repos["user/run"].commits.values()
    assert any("checkpoint-2/training_args.bin" in files for files in commits)
    assert not [path for files in commits for path, content in files.items() if TOKEN.encode() in content]
    card = ModelCard((hub.repos["user/run"].files("main") or {})["README.md"].decode())
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_type == "perplexity"
    assert card.data.metrics == ["perplexity"]
    assert "trained from scratch" in card.text
