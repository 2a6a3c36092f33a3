"""The figures of docs/ten_minutes.md and docs/reading_energies.md, and the numbers that these pages quote.

    python docs/figures.py        # about a minute on one core; writes docs/images, prints JSON lines

A GPT-2 of 4 blocks learns the characters of the Python language reference by predictive coding; then one batch that
it has not seen is relaxed with different numbers of sweeps and at different strengths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_pc import PCConfig, PCModel, PCTrainer, PCTrainingArguments
from hf_pc.diagnostics import compare_with_backprop
from hf_pc.diagnostics.plots import plot_history

Batch = dict[str, torch.Tensor]
SEQUENCE = 64
STD = 0.3
SWEEPS = range(1, 9)
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
RULES = ("plain", "centred", "extrapolated")


def sequences() -> tuple[torch.Tensor, int]:
    """Sequences of characters, [count, SEQUENCE], and how many characters there are."""
    text = "".join(topics[name] for name in sorted(topics))
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[character] for character in text])
    return ids[: len(ids) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE), len(index)


def train(rows: torch.Tensor, characters: int, steps: int) -> tuple[GPT2LMHeadModel, list[dict[str, Any]]]:
    set_seed(0)
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": SEQUENCE, "initializer_range": 0.06}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=characters, **sizes, **off))
    parts = [part.tolist() for part in (rows[:-64], rows[-64:])]
    data = [Dataset.from_dict({"input_ids": part, "labels": part}) for part in parts]
    with tempfile.TemporaryDirectory() as folder:
        args = PCTrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=4e-3, lr_scheduler_type="cosine",
            warmup_steps=steps // 10, logging_steps=max(1, steps // 40), eval_strategy="steps",
            eval_steps=max(1, steps // 8), save_strategy="no", report_to=[], use_cpu=True,
        )  # fmt: skip
        config = PCConfig(relaxed_fraction=0.1, learning="balanced")
        trainer = PCTrainer(model=model, args=args, pc_config=config, train_dataset=data[0], eval_dataset=data[1])
        trainer.train()
    return model.eval(), trainer.state.log_history


def relaxed(model: GPT2LMHeadModel, batch: Batch, **settings: Any) -> Any:
    pc = PCModel(model, PCConfig(**settings))
    try:
        return pc.relax(**batch)
    finally:
        pc.detach()


def relaxation(path: Path, model: GPT2LMHeadModel, batch: Batch) -> dict[str, Any]:
    """What a relaxation does, sweep by sweep: the free energy falls, the residual too, nodes share what is left."""
    found = [relaxed(model, batch, relative_std=STD, sweeps=sweeps) for sweeps in SWEEPS]
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    energy, residual, nodes = figure.subplots(1, 3)
    energy.plot(SWEEPS, [out.free_energy for out in found], marker="o", label="free energy F")
    energy.plot(SWEEPS, [out.energies["output"] for out in found], marker="o", label="its part at the output")
    energy.set(xlabel="sweeps", ylabel="nats per token", title="The states move, F falls")
    energy.legend()
    residual.plot(SWEEPS, [out.residual for out in found], marker="o", color="C3")
    residual.axhline(0.05, color="C3", linestyle=":", label="equilibrium below")
    residual.set(xlabel="sweeps", yscale="log", title="Residual: how far from rest")
    residual.legend()
    last = {name: value for name, value in found[-1].energies.items() if name != "output"}
    nodes.barh([name.removeprefix("transformer.") for name in last], list(last.values()), color="C2")
    nodes.set(xlabel="nats per token", title=f"Energy of every node after {SWEEPS[-1]} sweeps")
    for axes in (energy, residual, nodes):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return {"free_energy": [out.free_energy for out in found], "residual": [out.residual for out in found],
            "energies": last, "relaxed_fraction": found[-1].relaxed_fraction}  # fmt: skip


def distance(model: GPT2LMHeadModel, batch: Batch, rule: str, std: float) -> float:
    """|PC's gradient - backprop's| / |backprop's|, all parameters together."""
    pc = PCModel(model, PCConfig(relative_std=std, sweeps=8, learning=rule))
    try:
        facts = compare_with_backprop(pc, batch, group=lambda name: "all")["all"]
    finally:
        pc.detach()
    return float((1 + facts["norm_ratio"] ** 2 - 2 * facts["norm_ratio"] * facts["cosine"]) ** 0.5)


def strength(path: Path, model: GPT2LMHeadModel, batch: Batch) -> dict[str, Any]:
    """What the strength of relaxation does to the gradient, and what the rules of learning do about it."""
    fractions = [relaxed(model, batch, relative_std=std, sweeps=8).relaxed_fraction for std in STRENGTHS]
    distances = {rule: [distance(model, batch, rule, std) for std in STRENGTHS] for rule in RULES}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(STRENGTHS, fractions, marker="o")
    left.axhline(0.02, color="C0", linestyle=":", label="backprop-like below")
    left.set(xlabel="relative_std", ylabel="relaxed_fraction", xscale="log", yscale="log", title="The dial")
    left.set_xticks(STRENGTHS, [f"{std:g}" for std in STRENGTHS])
    left.minorticks_off()
    left.legend()
    for rule, values in distances.items():
        right.plot(fractions, values, marker="o", label=rule)
    right.set(xlabel="relaxed_fraction", ylabel="relative distance", xscale="log", yscale="log",
              title="From backprop's gradient")  # fmt: skip
    right.legend(title="learning", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return {"relative_std": STRENGTHS, "relaxed_fraction": fractions, "distance": distances}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "images")
    args = parser.parse_args(argv)
    rows, characters = sequences()
    model, history = train(rows, characters, args.steps)
    batch = {"input_ids": rows[-64:-48], "labels": rows[-64:-48]}
    plot_history(args.output_dir / "run.png", history)
    found = {
        "training": {"eval_loss": [entry["eval_loss"] for entry in history if "eval_loss" in entry]},
        "relaxation": relaxation(args.output_dir / "relaxation.png", model, batch),
        "strength": strength(args.output_dir / "strength.png", model, batch),
    }
    for name, facts in found.items():
        print(json.dumps({name: facts}))
    return found


if __name__ == "__main__":
    main()
