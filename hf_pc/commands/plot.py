"""`hf-pc plot RUN_DIR`: the curves of a run, the energy of every node over time, and the regime."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from hf_pc.commands.runs import history
from hf_pc.commands.waiting import stages
from hf_pc.diagnostics.plots import plot_history
from hf_pc.measurements import regime

HELP = "draw a run: curves, the energy of every node over time, the regime"
EXAMPLE = "hf-pc plot runs/clm --output clm.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the output_dir of a PCTrainer, finished or not")
    parser.add_argument("--output", type=Path, help="the PNG to write; default: plot.png in the run's folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    output = args.output or args.run / "plot.png"
    with stages(2) as begin:
        begin("reading the log")
        entries = history(args.run)
        if output.suffix.lower() != ".png" or output.is_dir():
            raise ValueError(f"--output {output}: the name of a file that ends in .png is needed")
        if not output.parent.is_dir():
            raise FileNotFoundError(f"--output {output}: there is no folder {output.parent}")
        begin("drawing")
        found: dict[str, Any] = {"figure": str(plot_history(output, entries)), "steps": entries[-1]["step"]}
    for name in ("loss", "eval_loss"):
        values = [entry[name] for entry in entries if name in entry]
        if values:
            found[name] = values[-1]
    means = [[e[name] for e in entries if name in e] for name in ("relaxed_fraction", "residual")]
    if all(means):
        found["relaxed_fraction"], found["residual"] = map(statistics.fmean, means)
        found["regime"] = regime(found["relaxed_fraction"], found["residual"])
    return found


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    for name, value in found.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
