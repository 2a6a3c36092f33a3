"""Pushes and loads through the real huggingface_hub client, against a local stand-in of the Hub.

HF_ENDPOINT is read when huggingface_hub is imported, so each side is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub

ROOT = Path(__file__).parents[1]
SMALL = "n_layer=2,n_embd=16,n_head=2,n_positions=32"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def python(hub: Hub, tmp_path: Path) -> Run:
    """Runs a file or `-c code` in a process whose Hub is the stand-in."""

    def run(*args: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
                       "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
        environment.pop("HF_TOKEN", None)
        if token:
            environment["HF_TOKEN"] = token
        return subprocess.run([sys.executable, *args], cwd=tmp_path, env=environment, text=True, capture_output=True)

    return run


@pytest.fixture
def example(python: Run, tmp_path: Path) -> Run:
    """Runs run_clm_pc.py on a small text, pushing to user/tiny."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(200)) + "\n")

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        settings = ["--train_file", str(text), "--block_size", "32", "--config_overrides", SMALL, "--max_steps", "4",
                    "--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu"]  # fmt: skip
        pushing = ["--push_to_hub", "--hub_model_id", "user/tiny"]
        return python(str(ROOT / "examples" / "run_clm_pc.py"), *settings, *pushing, *flags)

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
