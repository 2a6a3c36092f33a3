"""Pictures of a run, from the Trainer's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

History = Sequence[Mapping[str, Any]]


def _series(history: History, name: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def plot_run(path: Path, histories: Mapping[str, History], pc: str = "PC") -> Path:
    """Write a PNG: the learning curves of several runs, and the energy of every node of one of them over training.

    Args:
        path: the PNG to write.
        histories: `trainer.state.log_history` by the name of the run.
        pc: the run whose energies are shown.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    curves, energies = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        color = f"C{index}"
        curves.plot(*_series(history, "loss"), color=color, alpha=0.35, label=f"{name}, training")
        curves.plot(*_series(history, "eval_loss"), color=color, marker="o", markersize=4, label=f"{name}, validation")
    curves.set(xlabel="optimiser step", ylabel="nats per token", title="Loss of a plain forward pass")
    curves.legend()
    labels = list(dict.fromkeys(key for entry in histories[pc] for key in entry if key.startswith("energy/")))
    nodes = [label for label in labels if label != "energy/output"]
    colors = colormaps["viridis"]
    for index, label in enumerate(nodes):
        shade = colors(index / max(len(nodes) - 1, 1))
        shown = label.removeprefix("energy/") if len(nodes) <= 12 or index in (0, len(nodes) - 1) else None
        energies.plot(*_series(histories[pc], label), color=shade, label=shown)
    energies.set(xlabel="optimiser step", ylabel="nats per token", title="Energy of every node at the relaxed states")
    if any(value > 0 for label in nodes for value in _series(histories[pc], label)[1]):  # at T = 1 all are zero
        energies.set_yscale("log")
    if nodes:
        energies.legend(fontsize="small")
    for axes in (curves, energies):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    return path
