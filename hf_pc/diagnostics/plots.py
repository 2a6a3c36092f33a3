"""Pictures of a run, from the Trainer's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_pc.measurements import AT_EQUILIBRIUM, BACKPROP_LIKE

History = Sequence[Mapping[str, Any]]


def _series(history: History, name: str) -> tuple[list[float], list[float]]:
    points = {float(entry["step"]): float(entry[name]) for entry in history if name in entry}  # a step's last value
    return list(points), list(points.values())


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
        color, line = f"C{index}", "--" if index else "-"  # of curves that coincide both are seen
        curves.plot(*_series(history, "loss"), color=color, linestyle=line, alpha=0.35, label=f"{name}, training")
        curves.plot(*_series(history, "eval_loss"), color=color, linestyle=line, marker="o", markersize=4,
                    label=f"{name}, validation")  # fmt: skip
    curves.set(xlabel="optimiser step", ylabel="nats per label", title="Loss of a plain forward pass")
    curves.legend()
    labels = list(dict.fromkeys(key for entry in histories[pc] for key in entry if key.startswith("energy/")))
    nodes = [label for label in labels if label != "energy/output"]
    colors = colormaps["viridis"]
    for index, label in enumerate(nodes):
        shade = colors(index / max(len(nodes) - 1, 1))
        shown = label.removeprefix("energy/") if len(nodes) <= 12 or index in (0, len(nodes) - 1) else None
        energies.plot(*_series(histories[pc], label), color=shade, label=shown)
    energies.set(xlabel="optimiser step", ylabel="nats per label", title="Energy of every node at the relaxed states")
    if any(value > 0 for label in nodes for value in _series(histories[pc], label)[1]):  # at T = 1 all are zero
        energies.set_yscale("log")
    if nodes:
        energies.legend(fontsize="small")
    for axes in (curves, energies):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    return path


def energy_image(history: History) -> Any:
    """The heat map of a run's energies as pixels, [height, width, 3], 8 bits each."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    _heat(figure, figure.subplots(), history)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _heat(figure: Any, axes: Any, history: History) -> None:
    """The energy of every node over time: a row for each, colours in nats per label on a scale of powers."""
    import numpy as np
    from matplotlib.colors import LogNorm

    labels = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("energy/")))
    nodes = [label for label in labels if label != "energy/output"]
    rows = [entry for entry in history if nodes and nodes[0] in entry]
    if rows:
        table = np.array([[max(float(row.get(node, 0.0)), 0.0) for row in rows] for node in nodes])
        positive = table[table > 0]
        norm = LogNorm(max(positive.min(), positive.max() * 1e-6), positive.max()) if positive.size else None
        steps = np.array([row["step"] for row in rows], dtype=float)
        shown = axes.pcolormesh(steps, np.arange(len(nodes)), np.where(table > 0, table, np.nan), norm=norm)
        figure.colorbar(shown, ax=axes)
        if len(nodes) <= 16:
            axes.set_yticks(range(len(nodes)), [node.removeprefix("energy/") for node in nodes], fontsize="small")
    axes.set(xlabel="optimiser step", ylabel="input side to output side" if len(nodes) > 16 else "")
    axes.set_title("Energy of every node, nats per label")


def plot_history(path: Path, history: History) -> Path:
    """Write a PNG of one run: its curves, the energy of every node over time as a heat map, and its regime.

    Args:
        path: the PNG to write.
        history: `trainer.state.log_history`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    curves, heat, regimes = figure.subplots(1, 3)
    curves.plot(*_series(history, "loss"), alpha=0.5, label="training")
    curves.plot(*_series(history, "eval_loss"), marker="o", markersize=4, label="validation")
    curves.set(xlabel="optimiser step", ylabel="nats per label", title="Loss of a plain forward pass")
    curves.legend()
    _heat(figure, heat, history)
    for name, color in (("relaxed_fraction", "C0"), ("residual", "C3")):
        regimes.plot(*_series(history, name), color=color, label=name)
    regimes.axhline(BACKPROP_LIKE, color="C0", linestyle=":", label="backprop-like below")
    regimes.axhline(AT_EQUILIBRIUM, color="C3", linestyle=":", label="equilibrium below")
    regimes.set(xlabel="optimiser step", ylabel="ratio", title="Regime")
    if any(value > 0 for name in ("relaxed_fraction", "residual") for value in _series(history, name)[1]):
        regimes.set_yscale("log")
    regimes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    for axes in (curves, regimes):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return path
