"""On a GPU: what NCCL and FSDP2 make of a run, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import HERE

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
