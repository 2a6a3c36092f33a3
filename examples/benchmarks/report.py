"""The table and the picture of a comparison of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def show(lines: list[dict[str, Any]]) -> None:
    """The table, on standard error: standard output is for the JSON lines."""
    table = Table(
        "method", "test perplexity", "learning rate", "relaxed_fraction, residual, regime", "step time ratio"
    )
    for line in lines:
        spread = "" if line["spread"] is None else f" +- {line['spread']:.2f}"
        rates = line["validation_loss_by_rate"]
        facts = f"{line['relaxed_fraction']:.3f}, {line['residual']:.3f}, {line['regime']}" if "regime" in line else ""
        best, ratio = min(rates, key=lambda rate: rates[rate]), f"{line['step_time_ratio']:.2f}"
        table.add_row(line["method"], f"{line['mean']:.2f}{spread}", best, facts, ratio)
    Console(stderr=True, width=118).print(table)


def picture(path: Path, lines: list[dict[str, Any]], curves: dict[str, list[list[float]]]) -> None:
    """Training loss of every method, mean over seeds and over every 10 steps; test perplexities with their spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for index, line in enumerate(lines):
        name = line["method"]
        losses = torch.tensor(curves[name]).mean(0)
        window = max(1, min(10, len(losses) // 10))
        means = losses[: len(losses) // window * window].view(-1, window).mean(1)
        left.plot([window * (i + 1) for i in range(len(means))], means.tolist(), label=name, color=f"C{index}")
        right.errorbar(line["mean"], name, xerr=line["spread"] or None, fmt="o", color=f"C{index}", capsize=3)
    left.set(xlabel="optimiser step", ylabel="nats per token", title="Training loss of a plain forward pass")
    left.legend()
    right.invert_yaxis()
    right.margins(y=0.3)
    right.set(xlabel="perplexity of held-out text", title="Test perplexity (bars: spread over seeds)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
