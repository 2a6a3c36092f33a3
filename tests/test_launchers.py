"""The example as two processes, by both launchers: global metrics, and everything written once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pairs import ENV, ROOT, free_port
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(ROOT / "examples"))
import run_clm_pc

SMALL = "n_layer=2,n_embd=16,n_head=2,n_positions=32,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
SETTINGS = {
    "block_size": 32, "config_overrides": SMALL, "max_steps": 4,
    "logging_steps": 2, "optim": "sgd", "learning_rate": 0.1, "save_steps": 2, "report_to": "none",
}  # fmt: skip


def flags(folder: Path, **own: Any) -> list[str]:
    path = folder / "text.txt"
    path.write_text("\n".join(f"line {i}: the square of {i} is {i * i}." for i in range(400)) + "\n")
    given = {**SETTINGS, "train_file": str(path), "output_dir": str(folder / "out"), **own}
    return [
        "--use_cpu",
        "--do_train",
        "--do_eval",
        *(part for name in given for part in (f"--{name}", str(given[name]))),
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return run_clm_pc.main([*flags(folder, per_device_train_batch_size=8), "--no_compare_bp"])


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_the_example_as_two_processes(tmp_path: Path, alone: dict[str, Any], launcher: str) -> None:
    """The evaluation and the regime are those of one process with the whole batch; table, card, figures, picture and
    checkpoints are there once and whole."""
    start = {
        "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                       "--main_process_port", str(free_port())],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]  # fmt: skip
    script = str(ROOT / "examples" / "run_clm_pc.py")
    compare = "--no_compare_bp" if launcher == "torchrun" else "--compare_bp"
    done = subprocess.run(
        [sys.executable, *start, script, *flags(tmp_path, per_device_train_batch_size=4), compare],
        env={**ENV, "HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("validation loss, nats per label") == 1
    out = tmp_path / "out"
    results = json.loads((out / "all_results.json").read_text())
    for name in ("pc_eval_loss", "pc_perplexity", "relaxed_fraction", "residual"):
        assert results[name] == pytest.approx(alone[name], rel=1e-4)
    assert ("bp_eval_loss" in results) == (launcher == "accelerate")
    assert str(round(results["pc_perplexity"], 4)) in (out / "README.md").read_text()
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged if "loss" in entry] == [2, 4]
    checkpoint = out / "checkpoint-4"
    assert {"rng_state_0.pth", "rng_state_1.pth", "pc_state.json"} <= {path.name for path in checkpoint.iterdir()}
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-4"]
    AutoModelForCausalLM.from_pretrained(checkpoint)
