"""One of several processes of a model sharded by FSDP2: `train_sharded.py FOLDER`; see test_sharding.py.

Accelerate shards on accelerators alone: on the CPU it keeps the whole model in each process. All that it does for
accelerators runs on the CPU too, once it takes the processes for theirs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_trainer
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from scenarios import build, learn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_pc import PCTrainingArguments
from hf_pc.node import RELAX
from hf_pc.relaxation import Relaxation
from hf_pc.trainer import NonFiniteEnergyError

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NAMES = ("balanced", "accumulated", "stopping", "every_sweep_stopping", "lora", "refusing")


def arguments(**options: Any) -> PCTrainingArguments:
    AcceleratorState._reset_state()  # which keeps the first sharding that it is given
    made = PCTrainingArguments(**options)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


def shard(folder: Path, name: str, state_dict: str = "FULL_STATE_DICT", again: bool = False, **options: Any) -> Any:
    """The trainer of a scenario, sharded; with `again` blocks are computed anew in the backward pass."""
    config = {"version": 2, "state_dict_type": state_dict, "activation_checkpointing": again}
    run = build(folder, name, WORLD, fsdp=True, fsdp_config=config, **options)
    assert run.accelerator.is_fsdp2
    return run


def gathered_blocks(model: Any) -> int:
    blocks = model.transformer.h
    assert all(isinstance(block, FSDPModule) for block in blocks)
    return sum(not all(isinstance(p, DTensor) for p in block.parameters()) for block in blocks)


def watched(folder: Path) -> dict[str, list[Any]]:
    """How many blocks are gathered where relaxing sweeps meet a node, forwards and backwards, and inside a block;
    in which modes gradients were reduced; what a process holds of the weights."""
    run = shard(folder, "accumulated", max_steps=2)
    seen: dict[str, list[Any]] = {"forwards": [], "backwards": [], "inside": [], "reduced": []}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Relaxation, *args: Any) -> Any:
            if self.mode == RELAX:
                seen[name].append(gathered_blocks(run.model))
            return function(self, *args)

        return wrapper

    def inside(*_: Any) -> None:
        if run.pc is not None and run.pc.relaxation is not None and run.pc.relaxation.mode == RELAX:
            seen["inside"].append(gathered_blocks(run.model))

    def reduced(*args: Any, **kwargs: Any) -> Any:
        relaxation = run.pc.relaxation
        seen["reduced"].append((relaxation.mode, relaxation.phase.last, run.state.global_step))
        return reduce(*args, **kwargs)

    for block in run.model.transformer.h:
        block.mlp.register_forward_hook(inside)
    visit, measure = Relaxation.visit, Relaxation.measure
    call = next(c for c in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, c))
    reduce = getattr(torch.distributed, call)  # the first since torch 2.13
    Relaxation.visit, Relaxation.measure = counted("forwards", visit), counted("backwards", measure)  # type: ignore
    setattr(torch.distributed, call, reduced)
    try:
        run.train()
    finally:
        Relaxation.visit, Relaxation.measure = visit, measure  # type: ignore[method-assign]
        setattr(torch.distributed, call, reduce)
    held = [p.to_local().numel() for p in run.model.parameters() if isinstance(p, DTensor)]
    return seen | {"held": [sum(held)]}


class PoisonShard(TrainerCallback):
    """Puts a NaN into what the last process holds of the second block."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if RANK == WORLD - 1:
            model.transformer.h[1].ln_1.weight.data.to_local().fill_(float("nan"))


def poisoned(folder: Path) -> str:
    try:
        shard(folder, "balanced", callbacks=[PoisonShard()]).train()
    except NonFiniteEnergyError as error:
        return str(error)
    return "nothing happened"


def loaded(folder: Path) -> Any:
    """What transformers shards when it loads a model, on the CPU too; Accelerate has no part in it."""
    PartialState(cpu=True)
    config = DistributedConfig(fsdp_size=WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
    assert isinstance(model, FSDPModule)
    return build(
        folder / "loaded", "balanced", WORLD, model=model, save_strategy="steps", save_only_model=True, save_steps=5
    )


def main(folder: Path) -> None:
    found: dict[str, Any] = {"loaded": learn(loaded(folder))}
    test_trainer.PCTrainingArguments = arguments  # type: ignore[assignment, misc]
    found |= {name: learn(shard(folder / name, name)) for name in NAMES}
    for kind in ("full", "sharded"):
        # an optimizer without state cannot be resumed from a full checkpoint of a sharded model
        adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 6}
        saving = {"save_strategy": "steps", "save_steps": 3, **adam}
        state_dict = f"{kind.upper()}_STATE_DICT"
        found[f"saved_{kind}"] = learn(shard(folder / kind, "balanced", state_dict, **saving))
        resumed = shard(folder / f"{kind}_resumed", "balanced", state_dict, **adam)
        found[f"resumed_{kind}"] = learn(resumed, str(folder / kind / "checkpoint-3"))
    found["recomputed"] = learn(shard(folder / "recomputed", "balanced", again=True))
    found["poisoned"] = poisoned(folder / "poisoned")
    found["watched"] = watched(folder / "watched")
    for name, value in found.items():
        torch.save(value, folder / f"{name}-{RANK}.pt")
    torch.distributed.destroy_process_group()  # left to the interpreter's exit, it may abort it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
