"""Timelines of split steps: what each block cost, and the picture of who computed what when."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from hf_pc.distributed.cost import Costs, Event, gpipe


def costs_of(events: Sequence[Event], args: argparse.Namespace, seconds: float) -> Costs:
    """Each block's seconds in the three kinds of pass, from one process's step; what was noted for no block, such as
    moving states, is spread over all of them evenly. A relaxing sweep counts once a signal has come to the block."""
    layers, sweeps = args.layers, args.sweeps
    calls: list[list[float]] = [[] for _ in range(layers + 1)]
    for what, begin, end in events:
        block = re.fullmatch(r"block (\d+)", what)
        if block or what == "after":
            calls[int(block[1]) if block else layers].append(end - begin)
    noted = sum(sum(found) for found in calls)
    rest = max(0.0, seconds - noted) / (sweeps * (layers + 1))
    reached = [found[max(1, layers - block) : -1] for block, found in enumerate(calls)]
    relax = [statistics.median(own or found[-1:]) + rest for own, found in zip(reached, calls, strict=True)]
    return Costs([found[0] + rest for found in calls], relax, [found[-1] + rest for found in calls])


def draw(path: Path, timelines: Sequence[Sequence[Event]], costs: Costs, split: Sequence[int]) -> None:
    """One step of every process as measured, and GPipe's of backprop as computed, over the same seconds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begin = min(event[1] for line in timelines for event in line)
    micro = 4 * len(split)
    schedule = gpipe(costs, split, micro)
    figure = Figure(figsize=(13, 3 + 1.1 * len(split)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    blocks = sum(split)
    shades = {f"block {i}": colormaps["viridis"](i / max(1, blocks - 1)) for i in range(blocks)}
    others = {"before": "tab:red", "after": "tab:orange", "wait": "white"}
    for rank, line in enumerate(timelines):
        for what, start, end in line:
            bar = [(start - begin, end - start)], (rank - 0.4, 0.8)
            above.broken_barh(*bar, facecolor=(shades | others)[what], edgecolor="white", lw=0.3)
    for rank, line in enumerate(schedule):
        for what, start, end in line:
            shade = "0.75" if what.startswith("forward") else "0.45"
            below.broken_barh([(start, end - start)], (rank - 0.4, 0.8), facecolor=shade, edgecolor="white", lw=0.3)
    above.set_title("Measured: a step of predictive coding by the state solver")
    below.set_title(f"Computed from the same times: a step of backprop, GPipe with {micro} micro-batches")
    named = list(shades)[:: max(1, blocks // 4)]
    above.legend(handles=[Patch(color=shades[name], label=name) for name in named]
                 + [Patch(color=others["after"], label="head and loss"),
                    Patch(facecolor="white", edgecolor="0.5", label="waiting")],
                 fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # fmt: skip
    below.legend(handles=[Patch(color="0.75", label="forward"), Patch(color="0.45", label="backward")], fontsize=8,
                 loc="center left", bbox_to_anchor=(1, 0.5))  # fmt: skip
    for axes in (above, below):
        axes.set(yticks=range(len(split)), yticklabels=[f"process {rank}" for rank in range(len(split))])
        axes.invert_yaxis()
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=120)
