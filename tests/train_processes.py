"""One of several processes: `train_processes.py FOLDER`; what it finds goes to FOLDER/<name>-<rank>.pt."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from scenarios import SCENARIOS, build, learn, refused
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer

from hf_pc import PCModel

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def collectives(run: Any, steps: int) -> dict[str, list[list[str]]]:
    """The collectives of every relaxation, and of every forward and backward pass that learns."""
    found: dict[str, list[list[str]]] = {"relaxing": [], "learning": []}

    def counted(name: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with profile(activities=[ProfilerActivity.CPU]) as events:
                result = function(*args, **kwargs)
            calls = [event.name for event in events.events() if event.name.startswith("c10d::")]
            found[name].append([call.removeprefix("c10d::").strip("_") for call in calls])
            return result

        return wrapper

    relax, step = PCModel._relax, Trainer.training_step
    PCModel._relax = counted("relaxing", relax)  # type: ignore[method-assign]
    Trainer.training_step = counted("learning", step)  # type: ignore[method-assign]
    run.args.max_steps = steps
    try:
        run.train()
    finally:
        PCModel._relax = relax  # type: ignore[method-assign]
        Trainer.training_step = step  # type: ignore[method-assign]
    return found


def train(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: learn(build(folder / name, name, WORLD)) for name in SCENARIOS}
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    found["saved"] = learn(build(folder / "two", "balanced", WORLD, **saving))
    found["resumed"] = learn(
        build(folder / "of_one", "balanced", WORLD, max_steps=6), str(folder / "one" / "checkpoint-3")
    )
    found["refused"] = refused(folder, RANK, WORLD)
    known = build(folder / "counted", "accumulated", WORLD, ddp_find_unused_parameters=False)
    return found | {"collectives": collectives(known, 3)}


def die(folder: Path) -> None:
    """The first process is killed while it writes its second checkpoint."""
    run = build(folder / "dying", "balanced", WORLD, save_strategy="steps", save_steps=2, max_steps=6)
    write = run._save_optimizer_and_scheduler

    def written(output_dir: str) -> None:
        write(output_dir)
        if RANK == 0 and run.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    run._save_optimizer_and_scheduler = written
    run.train()


def main(folder: Path) -> None:
    for name, value in train(folder).items():
        torch.save(value, folder / f"{name}-{RANK}.pt")
    torch.distributed.barrier()
    die(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
