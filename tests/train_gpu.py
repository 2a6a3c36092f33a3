"""Short runs on a GPU: `train_gpu.py FOLDER [RUN...]`, alone or under torchrun; weights go to FOLDER/<by whom>.pt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pc import PCConfig, PCTrainer, PCTrainingArguments

LAUNCHED = "RANK" in os.environ
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
BALANCED: dict[str, Any] = {"learning": "balanced", "relaxed_fraction": 0.1}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "balanced": (BALANCED, {}),
    "accumulated": (BALANCED | {"learning": "one_sided"}, {"gradient_accumulation_steps": 2}),
    "state": ({"solver": "state", "relaxed_fraction": 0.1, "sweeps": 5}, {}),
    "every_sweep": (
        {"solver": "state", "relaxed_fraction": 0.1, "sweeps": 3, "weight_update": "every_sweep"}, {}
    ),
    "langevin": ({"solver": "langevin", "relative_std": 0.1}, {}),
    "recorded": (BALANCED | {"cuda_graph": True}, {}),
    "bf16_short": (BALANCED, {"bf16": True}),
    "bf16_recorded": (BALANCED | {"cuda_graph": True, "compile": True}, {"bf16": True}),
    "bf16": ({"relaxed_fraction": 0.1, "tolerance": 0.05}, {"bf16": True}),
    "sharded": (BALANCED, SHARDED if LAUNCHED else {}),
}  # fmt: skip


def data() -> list[dict[str, torch.Tensor]]:
    """Sequences with unequal label counts."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(32):
        ids = torch.randint(0, 64, (32,), generator=generator)
        skipped = int(torch.randint(0, 20, (), generator=generator))
        rows.append({"input_ids": ids, "labels": torch.cat([torch.full((skipped,), -100), ids[skipped:]])})
    return rows


def learn(folder: Path, name: str) -> dict[str, torch.Tensor]:
    config, options = RUNS[name]
    AcceleratorState._reset_state()  # which keeps the first precision and sharding that it is given
    set_seed(0)
    size = {"vocab_size": 64, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    args = PCTrainingArguments(
        str(folder / name), max_steps=5, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd", report_to=[],
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    run = PCTrainer(model, args, train_dataset=data(), pc_config=PCConfig(**config))
    run.train()
    assert run.args.device.type == "cuda"
    weights = run.accelerator.get_state_dict(run.model_wrapped)
    return {key.removeprefix("module."): value.detach().double().cpu() for key, value in weights.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: learn(folder, name) for name in sys.argv[2:] or RUNS}
    if LAUNCHED:
        assert torch.distributed.get_backend() == "nccl"
        torch.distributed.destroy_process_group()
    torch.save(found, folder / f"{'launched' if LAUNCHED else 'alone'}.pt")
