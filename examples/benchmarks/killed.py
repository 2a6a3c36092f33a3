"""Kills training at random moments: does it resume from a whole checkpoint, and end with the weights it would have?

A run saves at every step. It is killed with SIGKILL, again and again, until it has finished; then its weights are
compared bit for bit with those of a run that nobody disturbed, and the next run begins. After each kill every
checkpoint has to hold the files that a whole one holds. Standard output is JSON lines: one for each kill, one for each
finished run, and one for all.

    python examples/benchmarks/killed.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_pc import PCConfig, PCTrainer, PCTrainingArguments

RESULT = "weights.safetensors"


def train(folder: Path, steps: int) -> None:
    """Train, from the last checkpoint if there is one; with dropout, steering and AdamW there is much to restore."""
    set_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    texts = [[(i * 7 + j * j) % 50 for j in range(16)] for i in range(32)]
    rows = [{"input_ids": text, "labels": text} for text in texts]
    args = PCTrainingArguments(
        str(folder), max_steps=steps, save_strategy="steps", save_steps=1, save_total_limit=2, report_to=[],
        per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    config = PCConfig(sweeps=3, relaxed_fraction=0.05, learning="mirrored")
    run = PCTrainer(model=model, args=args, pc_config=config, train_dataset=rows)
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    save_file({"weights": weights}, folder / f"{RESULT}.partial")
    (folder / f"{RESULT}.partial").rename(folder / RESULT)


def start(folder: Path, steps: int) -> int:
    """Train in a process of its own, forked from this one, where everything is imported already; its id."""
    folder.mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            train(folder, steps)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def finished(process: int) -> bool:
    """Whether a process that has ended did so by itself. Raises RuntimeError if it failed."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with status {status}")
    return status == 0


def checkpoints(folder: Path) -> dict[str, set[str]]:
    """The files in each checkpoint of a run."""
    return {path.name: {file.name for file in path.iterdir()} for path in sorted(folder.glob("checkpoint-*"))}


def broken(folder: Path, expected: set[str]) -> list[str]:
    """The checkpoints that are not whole: files are missing, cannot be read, or are of another step."""
    found = []
    for name, files in checkpoints(folder).items():
        try:
            load_file(folder / name / "model.safetensors")
            state = json.loads((folder / name / "trainer_state.json").read_text(encoding="utf-8"))
            whole = files == expected and name == f"checkpoint-{state['global_step']}"
        except Exception:
            whole = False
        if not whole:
            found.append(name)
    return found


def report(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """0 if every checkpoint was whole and every run ended with the same bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps of each run, a checkpoint after each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        begun = time.monotonic()
        if not finished(start(root / "undisturbed", args.steps)):
            raise RuntimeError("the undisturbed run was killed")
        duration = time.monotonic() - begun
        expected = load_file(root / "undisturbed" / RESULT)["weights"]
        files = checkpoints(root / "undisturbed")[f"checkpoint-{args.steps}"]
        kills = runs = identical = not_whole = resumed = 0
        while kills < args.kills:
            folder, own = root / f"run-{runs}", 0
            while True:
                before = get_last_checkpoint(str(folder)) if folder.is_dir() else None
                resumed += before is not None
                process = start(folder, args.steps)
                if kills < args.kills:
                    time.sleep(moments.uniform(0, duration))
                    os.kill(process, signal.SIGKILL)
                if finished(process):
                    break
                kills, own = kills + 1, own + 1
                bad = broken(folder, files)
                not_whole += len(bad)
                report({"kill": kills, "run": runs, "checkpoints": sorted(checkpoints(folder)), "not_whole": bad,
                        "was_writing": (folder / "_unfinished").exists()})  # fmt: skip
            same = torch.equal(load_file(folder / RESULT)["weights"], expected)
            identical += same
            runs += 1
            report({"run": runs - 1, "kills": own, "identical": same})
    report({"kills": kills, "runs": runs, "identical": identical, "resumed": resumed, "not_whole": not_whole,
            "seconds_undisturbed": round(duration, 2)})  # fmt: skip
    return int(identical < runs or not_whole > 0)


if __name__ == "__main__":
    raise SystemExit(main())
