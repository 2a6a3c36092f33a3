"""Train one causal language model over several processes, each with some of its blocks.

    torchrun --standalone --nproc_per_node 2 examples/run_split_pc.py
    torchrun --standalone --nproc_per_node 2 examples/run_split_pc.py --model_name_or_path M --train_file F

A loop of its own, with `SplitPCModel`: see docs/distributed.md. Takes the flags of run_clm_pc.py that say what to
train on, and every PCConfig field. Each process writes its optimizer's state beside the checkpoint, and a run that is
started again with the same number of processes goes on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from clm_data import DataArguments, load_blocks, load_text
from run_clm_pc import ModelArguments, load_model_and_tokenizer
from task import at_least, flags, launch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, default_data_collator, get_scheduler, set_seed

from hf_pc import PCConfig
from hf_pc.distributed import SplitPCModel


@dataclass
class SplitArguments:
    output_dir: Path = field(default=Path("runs/split"), metadata={"help": "Where everything goes."})
    max_steps: int = 100
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step: every process sees all of them."})
    learning_rate: float = 4e-3
    warmup_steps: int = 15
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    save_steps: int = field(default=50, metadata={"help": "Save, and evaluate, every so many steps."})
    split: list[int] | None = field(default=None, metadata={"help": "Blocks of each process; default: balanced."})
    seed: int = 42


def batches(data: Any, size: int, seed: int, start: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end, shuffled anew in every pass over the data, from the `start`-th on.

    Raises ValueError if there is no whole batch.
    """
    if len(data) < size:
        raise ValueError(f"--batch_size {size} is over the {len(data)} sequences of the training text")
    count = epoch = 0
    while True:
        order = torch.Generator().manual_seed(seed + epoch)
        loader = DataLoader(
            data, size, shuffle=True, generator=order, collate_fn=default_data_collator, drop_last=True
        )
        for batch in loader:
            if count >= start:
                yield batch
            count += 1
        epoch += 1


def on(device: torch.device, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def save(pc: SplitPCModel, tokenizer: Any, folder: Path, state: dict[str, Any], progress: dict[str, Any]) -> None:
    """The whole model and every process's optimizer, in a folder that appears when it is complete."""
    partial = folder.with_suffix(".partial")
    if pc.stage.first:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that ended while it wrote
    pc.save_pretrained(partial)
    torch.save(state, partial / f"process_{pc.neighbours.index}_of_{pc.neighbours.count}.pt")
    PartialState().wait_for_everyone()
    if pc.stage.first:
        tokenizer.save_pretrained(partial)
        (partial / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
        before = folder.with_suffix(".before")
        if folder.is_dir():
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
        partial.rename(folder)
        shutil.rmtree(before, ignore_errors=True)
    PartialState().wait_for_everyone()


def whole(folder: Path) -> Path:
    """The last checkpoint that is complete; the one before, where a run ended between the two renames of `save`."""
    before = folder.with_suffix(".before")
    return before if before.is_dir() and not folder.is_dir() else folder


def check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where the run in a folder was begun with another model, or other data."""
    for name, value in now.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"--output_dir {folder} holds a run with --{name} {before[name]}, not {value}: take another folder, "
                "or remove that one"
            )


def own_state(folder: Path, pc: SplitPCModel) -> Path:
    """The file of this process's optimizer. Raises ValueError if another number of processes saved it."""
    path = folder / f"process_{pc.neighbours.index}_of_{pc.neighbours.count}.pt"
    if not path.is_file():
        several = next(iter(folder.glob("process_*.pt")), Path("0")).stem.rpartition("_")[2]
        raise ValueError(f"{folder} was saved by {several} processes, not by {pc.neighbours.count}: start as many, or "
                         "take it as --model_name_or_path of a run with another --output_dir")  # fmt: skip
    return path


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ModelArguments, DataArguments, SplitArguments, PCConfig))  # type: ignore[arg-type]
    parser.set_defaults(solver="state", sweeps=12, relaxed_fraction=0.03, block_size=128)
    model_args, data_args, args, config = parser.parse_args_into_dataclasses(flags(argv))
    at_least("batch_size", args.batch_size, 1)
    for name in ("max_steps", "logging_steps", "save_steps"):
        at_least(name, getattr(args, name), 1)
    device = PartialState(cpu=not torch.cuda.is_available()).device  # and the process group, if there are several
    set_seed(args.seed)
    data = load_text(data_args, model_args.cache_dir, model_args.token)
    last = whole(args.output_dir / "last")
    resumed = json.loads((last / "progress.json").read_text(encoding="utf-8")) if last.is_dir() else {"step": 0}
    begun = {name: getattr(model_args, name) for name in ("model_name_or_path", "config_name", "model_type",
                                                          "config_overrides")}  # fmt: skip
    begun |= {name: getattr(data_args, name) for name in ("train_file", "dataset_name", "dataset_config_name")}
    if resumed["step"]:
        check_same(args.output_dir, resumed, begun)
        model_args.model_name_or_path, model_args.config_overrides = str(last), None
    model, tokenizer = load_model_and_tokenizer(model_args, data)
    train, valid = load_blocks(data_args, data, model, tokenizer)
    own = torch.Generator()  # evaluation leaves the generator of dropout masks alone
    validation = DataLoader(valid, args.batch_size, collate_fn=default_data_collator, generator=own)
    pc = SplitPCModel(model.to(device).train(), config, split=args.split)
    optimizer = torch.optim.AdamW(pc.parameters(), lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = get_scheduler("cosine", optimizer, args.warmup_steps, args.max_steps)
    if resumed["step"]:
        state = torch.load(own_state(last, pc), weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        pc.load_state_dict(json.loads((last / "pc_state.json").read_text(encoding="utf-8")))
    results: dict[str, float] = {}
    if resumed["step"] >= args.max_steps and pc.stage.first:
        print(f"{last} is of step {resumed['step']}: nothing is left of --max_steps {args.max_steps}", file=sys.stderr)
    given = batches(train, args.batch_size, args.seed, resumed["step"])
    steps = tqdm(range(resumed["step"] + 1, args.max_steps + 1), disable=not pc.stage.first)
    for step in steps:
        found = pc.accumulate_grad(**on(device, next(given)))
        pc.clip_grad_norm_(args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        pc.steer()
        if step % args.logging_steps == 0 and pc.stage.first:
            steps.set_postfix(loss=f"{found.feedforward_energy:.3f}", residual=f"{found.residual:.3f}")
        if step % args.save_steps == 0 or step == args.max_steps:
            eval_loss = pc.evaluate(on(device, batch) for batch in validation)
            results = {"step": step, "loss": found.feedforward_energy, "eval_loss": eval_loss,
                       "relaxed_fraction": found.relaxed_fraction, "residual": found.residual}  # fmt: skip
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                     "random": torch.get_rng_state(),
                     "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}  # fmt: skip
            save(pc, tokenizer, args.output_dir / "last", state, begun | results)
            if pc.stage.first:
                print(json.dumps(results), flush=True)
    pc.detach()
    return results


if __name__ == "__main__":
    launch(main)
