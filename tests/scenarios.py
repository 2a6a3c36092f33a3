"""Short runs on batches of 8 sequences in all, however many processes share them; see test_processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from test_invariants import make
from test_trainer import RELAXING, Poison, rows, trainer

import hf_pc.model
from hf_pc import PCConfig, PCModel
from hf_pc.solvers.descent import Descent
from hf_pc.trainer import NonFiniteEnergyError

#: a step that grows with the gradient: Adam makes steps of rounding where a gradient is zero
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 5, "per_device_eval_batch_size": 2}
FREE = PCConfig(sweeps=4, relative_std=3.0)  # so free that sweeps are refused
MOVING = {"solver": "state", "relative_std": 0.3, "weight_update": "every_sweep"}
#: weights after five steps are to be those of one process
SCENARIOS: dict[str, tuple[PCConfig, dict[str, Any]]] = {
    "plain": (RELAXING, {}),
    "balanced": (PCConfig(sweeps=3, relaxed_fraction=0.05, learning="balanced"), {}),
    "accumulated": (PCConfig(sweeps=3, relaxed_fraction=0.05, learning="centred"), {"gradient_accumulation_steps": 2}),
    "stopping": (PCConfig(sweeps=12, relative_std=1.0, tolerance=1e-3), {}),
    "every_sweep": (PCConfig(sweeps=5, **MOVING), {"max_grad_norm": 0.5}),
    "every_sweep_stopping": (PCConfig(sweeps=16, step_size=0.1, tolerance=0.592, **MOVING), {"max_grad_norm": 0.003}),
    "lora": (RELAXING, {"adapter": True, "learning_rate": 1.0}),
    "refusing": (FREE, {"name": "llama", "learning_rate": 1.0}),
    "refusing_known": (FREE, {"name": "llama", "learning_rate": 1.0, "ddp_find_unused_parameters": False}),
}


def adapted() -> Any:
    torch.manual_seed(0)
    return get_peft_model(make("gpt2"), LoraConfig(target_modules=["c_attn", "c_fc"], r=2))


def build(folder: Path, name: str, processes: int, **options: Any) -> Any:
    """The trainer of a scenario."""
    config, own = SCENARIOS[name]
    merged = {**SGD, **own, **options}
    if merged.pop("adapter", False):
        merged["model"] = adapted()
    size = 8 // processes // merged.get("gradient_accumulation_steps", 1)
    return trainer(folder, config, per_device_train_batch_size=size, **merged)


def full(model: Any) -> torch.Tensor:
    """All weights of a model, sharded or not."""
    values = (getattr(value, "full_tensor", lambda value=value: value)() for value in model.state_dict().values())
    return torch.cat([value.detach().flatten().clone() for value in values])


@contextmanager
def recorded(seen: dict[str, list[Any]]) -> Iterator[None]:
    """Note how many sweeps each batch took here, whether each learning pass stood, and how often others disagreed."""
    measured, confirm, everywhere = PCModel.measured, Descent.confirm, hf_pc.model.everywhere
    seen |= {"sweeps": [], "stood": [], "outvoted": 0}

    def voted(holds: bool, device: torch.device) -> bool:
        agreed = everywhere(holds, device)
        seen["outvoted"] += holds != agreed
        return agreed

    def noted(self: PCModel, relaxation: Any) -> Any:
        seen["sweeps"].append(relaxation.sweeps)
        return measured(self, relaxation)

    def confirmed(self: Descent) -> bool:
        seen["stood"].append(confirm(self))
        return bool(seen["stood"][-1])

    PCModel.measured, Descent.confirm = noted, confirmed  # type: ignore[method-assign]
    hf_pc.model.everywhere = voted
    try:
        yield
    finally:
        PCModel.measured, Descent.confirm = measured, confirm  # type: ignore[method-assign]
        hf_pc.model.everywhere = everywhere


def learn(run: Any, resume: str | None = None) -> dict[str, Any]:
    """Train, and say what came of it."""
    seen: dict[str, Any] = {"start": full(run.model)}
    with recorded(seen):
        run.train(resume_from_checkpoint=resume)
    return seen | {"weights": full(run.model), "eval": run.evaluate()["eval_loss"], "logs": logs(run)}


def logs(run: Any) -> list[dict[str, float]]:
    """What was logged in training, as it was measured."""
    own = ("epoch", "step", "learning_rate", "sweeps", "grad_norm")  # of grad_norm and sweeps each process has its own
    return [
        {key: value for key, value in entry.items() if key not in own}
        for entry in run.state.log_history
        if "loss" in entry
    ]


def refused(folder: Path, rank: int, processes: int) -> dict[str, str]:
    """What each process says of runs that cannot be."""
    said: dict[str, str] = {}
    config = PCConfig(sweeps=3 + rank)
    nine = {"train_dataset": rows(9), "accelerator_config": {"even_batches": False}}
    wrong: dict[str, tuple[PCConfig, dict[str, Any]]] = {
        "config": (config, {}),
        "rows": (RELAXING, {"train_dataset": rows(1)}),
        "length": (RELAXING, {"train_dataset": rows(16 + rank)}),
        "split": (RELAXING, {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 1}),
        "uneven": (RELAXING, nine),
        "static": (RELAXING, {"ddp_static_graph": True}),
    }
    for name, (config, options) in wrong.items():
        try:
            trainer(folder / name, config, **options).train()
        except ValueError as error:
            said[name] = str(error)
    poison = [Poison(set(range(9)))] if rank == processes - 1 else []
    try:
        trainer(folder / "poisoned", RELAXING, callbacks=poison, max_steps=9).train()
    except NonFiniteEnergyError as error:
        said["poisoned"] = str(error)
    return said
