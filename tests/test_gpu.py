"""On a GPU: what NCCL and FSDP2 make of a run, in a process of their own, and steps recorded as CUDA graphs."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import HERE
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_pc import PCConfig, PCModel
from hf_pc.recorder import WARM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_one_process_of_nccl_trains_as_none(tmp_path: Path) -> None:
    """Started by torchrun, where collectives are NCCL's, and sharded by FSDP2, a run ends with the same weights."""
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "1"]):
        command = [sys.executable, *launcher, str(HERE / "train_gpu.py"), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=HERE)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, launched = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("alone", "launched"))
    for name, weights in alone.items():
        assert launched[name].keys() == weights.keys()
        assert max(float((launched[name][key] - value).abs().max()) for key, value in weights.items()) < 1e-6


def test_a_recorded_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """A Trainer's steps as CUDA graphs, in float32, and compiled in bfloat16, where the other run is not compiled."""
    runs = ("balanced", "recorded", "bf16_short", "bf16_recorded")
    command = [sys.executable, str(HERE / "train_gpu.py"), str(tmp_path), *runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "alone.pt", weights_only=True)
    for plain, recorded, most in (("balanced", "recorded", 1e-5), ("bf16_short", "bf16_recorded", 2e-3)):
        for key, value in found[plain].items():
            assert float((found[recorded][key] - value).abs().max()) < most, (recorded, key)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_recorded_steps_are_the_steps(kind: str, compiles: bool) -> None:
    """Gradients of recorded steps, with other batches and weights, are those of normal steps."""
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        size = {"vocab_size": 65, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=65, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        ))  # fmt: skip
    model = model.cuda().train()
    rules: list[dict[str, Any]] = [
        {"learning": "balanced", "relaxed_fraction": 0.2, "sweeps": 4},
        {"learning": "one_sided", "relaxed_fraction": 0.5, "sweeps": 5, "anderson_depth": 3},
        {"relative_std": 40.0, "sweeps": 2, "anderson_depth": 0},
    ]
    for rule in rules:
        generator = torch.Generator().manual_seed(0)
        data = [torch.randint(0, 65, (4, 32), generator=generator).cuda() for _ in range(WARM + 4)]
        found = []
        for recorded in (False, True):
            pc = PCModel(copy.deepcopy(model), PCConfig(**rule, compile=compiles, cuda_graph=recorded))
            steps = []
            for ids in data:
                report = pc.accumulate_grad(input_ids=ids, labels=ids, num_items_in_batch=ids.numel())
                pc.steer()
                steps.append((report, [p.grad.clone() for p in pc.model.parameters()]))
                with torch.no_grad():
                    for p in pc.model.parameters():
                        p -= 0.1 * p.grad
                        p.grad = None
            found.append(steps)
            pc.detach()
        for (one, gradients), (other, others) in zip(*found, strict=True):
            assert one.free_energy == pytest.approx(other.free_energy, rel=1e-3), rule
            assert one.refused == pytest.approx(other.refused, abs=0.1), rule
            for mine, its in zip(gradients, others, strict=True):
                assert float((mine - its).norm()) <= 1e-2 * float(its.norm()) + 1e-6, rule
