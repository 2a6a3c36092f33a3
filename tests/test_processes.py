"""Real processes: the same weights as one process, and a checkpoint that needs no hf_pc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_invariants import make

from hf_pc import PCConfig, PCModel

HERE = Path(__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


def launch(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("rule", ["plain", "balanced"])
def test_two_processes_train_as_one(tmp_path: Path, rule: str) -> None:
    """One process of 8 and two of 4, with unequal label counts, give the same weights; the two agree to the bit."""
    script = str(HERE / "train_processes.py")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch(script, str(tmp_path / "one"), "8", rule)
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    launch(*several, script, str(tmp_path / "two"), "4", rule)
    one = torch.load(tmp_path / "one" / "0.pt", weights_only=True)
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert (one["weights"] - first["weights"]).norm() / one["weights"].norm() < 1e-6
    assert abs(one["loss"] - first["loss"]) < 1e-5


def test_a_sweep_refused_on_one_process(tmp_path: Path) -> None:
    """Where one process refuses its learning pass all repeat it: nobody waits for ever, and the weights agree."""
    script = str(HERE / "train_processes.py")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, str(tmp_path))
    launch(*command, "1", "refusing")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["refused"] > 0
    assert torch.equal(first["weights"], second["weights"])


def test_checkpoint_loads_without_hf_pc(tmp_path: Path) -> None:
    """Where hf_pc cannot be imported, plain transformers loads the checkpoint and gives the same logits."""
    model = make("gpt2").eval()
    PCModel(model, PCConfig()).save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    launch(
        "-c",
        "import sys; sys.modules['hf_pc'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"folder = {str(tmp_path)!r}\n"
        "expected = torch.load(folder + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(folder).eval()\n"
        "assert torch.equal(model(expected['ids']).logits, expected['logits'])",
    )
