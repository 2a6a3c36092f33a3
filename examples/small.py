"""What the small experiments share: digits, a training loop for PC and backprop alike, a table, results on disk."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_pc import PCConfig, PCModel
from hf_pc.measurements import regime
from hf_pc.output import Output

Batch = dict[str, Tensor]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: training pixels and labels, test pixels and labels; pixels in [0, 1], [images, 64]."""
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    return pixels[:1400], labels[:1400], pixels[1400:], labels[1400:]


def batches(columns: dict[str, Tensor], size: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` random batches, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(next(iter(columns.values())))
    for _ in range(steps):
        chosen = torch.randint(0, rows, (size,), generator=generator)
        yield {name: column[chosen] for name, column in columns.items()}


def train(
    model: nn.Module, config: PCConfig | None, data: Iterator[Batch], steps: int, learning_rate: float, *,
    output: str, title: str,
) -> dict[str, Any]:  # fmt: skip
    """Adam on the gradients of PC, or of backprop where `config` is None; the losses and the regime it learned in."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    pc = PCModel(model, config) if config else None
    losses: list[float] = []
    relaxed: list[float] = []
    residuals: list[float] = []
    energy = Output.of(model, output)
    model.train()
    for batch in tqdm(data, total=steps, desc=title, leave=False):
        optimizer.zero_grad()
        if pc is not None:
            found = pc.accumulate_grad(**batch)
            pc.steer()
            relaxed.append(found.relaxed_fraction)
            residuals.append(found.residual)
            losses.append(found.feedforward_energy)
        else:
            inputs, labels = energy.split(batch)
            loss = energy.total(model(**inputs), labels).sum() / energy.count(labels)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    if pc is None:
        return {"losses": losses}
    pc.detach()
    fraction, residual = statistics.fmean(relaxed), statistics.fmean(residuals)
    return {"losses": losses, "relaxed_fraction": fraction, "residual": residual, "regime": regime(fraction, residual)}


def over_seeds(
    build: Callable[[], nn.Module], config: PCConfig | None, columns: dict[str, Tensor],
    measure: Callable[[nn.Module], dict[str, float]], *, seeds: int, steps: int, learning_rate: float, output: str,
    title: str, size: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """Mean and spread over seeds of what `measure` finds after training; each seed starts all methods alike."""
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = build()
        data = batches(columns, size, steps, seed)
        trained = train(model, copy.deepcopy(config), data, steps, learning_rate, output=output, title=title)
        model.eval()
        with torch.no_grad():
            runs.append(trained | measure(model) | {"model": model})
    names = [name for name, value in runs[0].items() if isinstance(value, float)]
    summary: dict[str, Any] = {name: statistics.fmean(run[name] for run in runs) for name in names}
    summary |= {f"{name}_spread": statistics.stdev(run[name] for run in runs) for name in names if seeds > 1}
    if "relaxed_fraction" in summary:
        summary["regime"] = regime(summary["relaxed_fraction"], summary["residual"])
    return summary | {"losses": runs[0]["losses"], "model": runs[0]["model"]}


def report(folder: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], results: Any) -> None:
    """Print a table, and write the results beside it as JSON."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def plain(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what JSON cannot hold."""
    return {name: value for name, value in results.items() if name not in ("model", "losses")}


def shown(results: dict[str, Any], name: str, form: str = ".3f") -> str:
    """A mean with its spread over seeds."""
    spread = f" +- {results[f'{name}_spread']:{form}}" if f"{name}_spread" in results else ""
    return f"{results[name]:{form}}{spread}"


def regime_of(results: dict[str, Any]) -> str:
    if "regime" not in results:
        return ""
    return f"{results['relaxed_fraction']:.3f}, {results['residual']:.3f}, {results['regime']}"
