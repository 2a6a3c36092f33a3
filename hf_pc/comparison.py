"""Train by PC and by backprop from the same weights, on the same batches, and set the two side by side."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, TrainerCallback

from hf_pc.cards import ROWS, is_repository, shown_base, write_card
from hf_pc.diagnostics.plots import plot_run
from hf_pc.hub import push_run
from hf_pc.json_files import read_json_file
from hf_pc.measurements import regime
from hf_pc.processes import at_once, gathered
from hf_pc.provenance import command
from hf_pc.trainer import BackpropTrainer, PCTrainer

History = list[dict[str, Any]]


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, logging, evaluation and saving left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds[1:] or self.seconds)

    def facts(self, side: str) -> dict[str, float]:
        """The median as a figure of a side; none where a run that was resumed had no step left."""
        return {f"{side}_step_seconds": self.median} if self.seconds else {}


class BarTitle(TrainerCallback):
    """Says on the progress bar of a trainer which side it trains."""

    def __init__(self, trainer: Any, title: str) -> None:
        self._trainer, self._title = trainer, title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(self._title)


def mean(history: History, name: str) -> float:
    values = [entry[name] for entry in history if name in entry]
    return statistics.fmean(values) if values else float("nan")


def last_energies(history: History) -> dict[str, float]:
    """The energy of every node in the last log that has any, nats per label; empty where none has."""
    found = ({name.removeprefix("energy/"): value for name, value in entry.items() if name.startswith("energy/")}
             for entry in reversed(history))  # fmt: skip
    return next((energies for energies in found if energies), {})


def _figures(side: str, metrics: dict[str, float]) -> dict[str, float]:
    measured = {name: metrics[f"eval_{name}"] for name in ("perplexity", "accuracy") if f"eval_{name}" in metrics}
    if "accuracy" in measured:  # of a class, nobody asks for a perplexity
        measured.pop("perplexity", None)
    return {f"{side}_eval_loss": metrics["eval_loss"]} | {f"{side}_{name}": value for name, value in measured.items()}


def train_pc(trainer: Any, timer: StepTimer) -> tuple[dict[str, Any], History]:
    """Train and save, or only evaluate, as the trainer's arguments say: the table's figures and the history."""
    args = trainer.args
    results: dict[str, Any] = {}
    history: History = []
    if args.do_train:
        trainer.add_callback(BarTitle(trainer, "PC"))
        resume: Any = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
        pushes, args.push_to_hub = args.push_to_hub, False  # later, with figures and card
        trainer.save_model()
        args.push_to_hub = pushes
        trainer.save_state()
        history = trainer.state.log_history
        results |= timer.facts("pc")
        if any("relaxed_fraction" in entry for entry in history):
            results |= {name: mean(history, name) for name in ("relaxed_fraction", "residual")}
            results["regime"] = regime(results["relaxed_fraction"], results["residual"])
            results["energies"] = last_energies(history)
    if args.do_eval:
        results |= _figures("pc", trainer.evaluate())
    return results, history


def train_backprop(
    trainer: Any, build: Callable[[Any, StepTimer], Any], weights: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], History]:
    """Train the PC trainer's model by backprop from `weights`, then put back what PC had learned.

    Args:
        build: makes the backprop trainer from its arguments and its timer.
    """
    model, args = trainer.model, copy.copy(trainer.args)
    learned = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    # a folder that nobody else has, and that is not pushed; the first process names it for all
    own, made, failure = trainer.is_world_process_zero(), "", None
    try:
        made = tempfile.mkdtemp(prefix="_backprop_", dir=args.output_dir) if own else ""
    except OSError as error:
        failure = f"no folder can be made in {args.output_dir}: {error}"
    at_once(failure)
    args.output_dir = gathered(made)[0]
    args.push_to_hub, args.report_to = False, []
    if not args.load_best_model_at_end:  # which is a comparison of best checkpoints, and needs them saved
        args.save_strategy = "no"
    timer = StepTimer()
    try:
        baseline = build(args, timer)
        baseline.add_callback(BarTitle(baseline, "backprop"))
        baseline.train()
        results: dict[str, Any] = _figures("bp", baseline.evaluate()) if args.do_eval else {}
    finally:
        if own:
            shutil.rmtree(args.output_dir, ignore_errors=True)
    model.load_state_dict(learned)
    return results | timer.facts("bp"), baseline.state.log_history


def run(
    model: Any, args: Any, pc_config: Any, options: dict[str, Any], *, compare_bp: bool, card: dict[str, Any],
    processing_class: Any = None, trainers: tuple[Any, Any] = (PCTrainer, BackpropTrainer), table: bool = True,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """Train and evaluate by PC, as the arguments say, and by backprop; write figures, picture and card; push them.

    Args:
        options: what both trainers take: data sets, collator, metrics.
        card: what `write_card` takes beside figures and settings.
        trainers: the classes for PC and for backprop.
        table: print the figures.

    Returns:
        The figures, and the PC trainer.
    """
    weights = copy.deepcopy(model.state_dict()) if compare_bp and args.do_train else {}
    timer = StepTimer()
    learn, baseline = trainers
    trainer = learn(
        model=model, args=args, pc_config=pc_config, processing_class=processing_class, callbacks=[timer], **options
    )
    if weights and trainer.is_fsdp_enabled:
        raise ValueError("--compare_bp trains a whole model again, and FSDP has sharded it: add --no_compare_bp")
    histories: dict[str, History] = {}
    results, history = train_pc(trainer, timer)
    if args.do_train:
        histories["PC"] = history
        if compare_bp:
            found, histories["backprop"] = train_backprop(
                trainer, lambda args, timer: baseline(model=model, args=args, callbacks=[timer], **options), weights
            )
            results |= found
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        if (made_by := command()) is not None:
            results["command"] = made_by
        results |= {"base_model": shown_base(card["base_model"]), "dataset": card.get("dataset", "")}
        results |= {name: card[name] for name in ("dataset_id", "auto_class") if card.get(name)}
        results["base_on_hub"] = is_repository(card["base_model"])
        finish(folder, results, histories)
        if table:
            show(results)
        if histories and "pc_eval_loss" in results:
            write_card(folder, trainer.pc_config, results, model_name=folder.name, **card)
        if args.push_to_hub and args.do_train:
            push_run(folder, trainer.hub_model_id, args.hub_token, args.hub_revision)
    return results, trainer


def finish(folder: Path, results: dict[str, Any], histories: dict[str, History]) -> None:
    """Write all_results.json and learning.png; where nothing was trained, add to the figures that are there."""
    if {"pc_step_seconds", "bp_step_seconds"} <= results.keys():
        results["step_time_ratio"] = results["pc_step_seconds"] / results["bp_step_seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "all_results.json"
    if not histories and path.is_file():  # of a training, whose other figures stay
        results |= read_json_file(path) | {name: value for name, value in results.items() if name.startswith("pc_")}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if histories:
        plot_run(folder / "learning.png", histories)


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="Predictive coding and backprop: same initial weights, batches and optimiser")
    table.add_column("")
    sides = ["pc"] + (["bp"] if any(name.startswith("bp_") for name in results) else [])
    for side in sides:
        table.add_column({"pc": "PC", "bp": "backprop"}[side], justify="right")
    for title, key, form in ROWS:
        if not any(f"{side}_{key}" in results for side in sides):
            continue
        cells = [f"{results[f'{s}_{key}']:{form}}" if f"{s}_{key}" in results else "" for s in sides]
        table.add_row(title, *cells)
    for key, form in (("step_time_ratio", ".2f"), ("relaxed_fraction", ".4f"), ("residual", ".4f"), ("regime", "")):
        if key in results:
            table.add_row(key, f"{results[key]:{form}}")
    Console(width=100).print(table)
