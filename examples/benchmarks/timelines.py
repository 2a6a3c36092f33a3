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
    moving states, is spread over all of them evenly."""
    layers, sweeps = args.layers, args.sweeps
    calls: list[list[float]] = [[] for _ in range(layers + 1)]
    for what, begin, end in events:
        block = re.fullmatch(r"block (\d+)", what)
        if block or what == "after":
            calls[int(block[1]) if block else layers].append(end - begin)
    noted = sum(sum(found) for found in calls)
    rest = max(0.0, seconds - noted) / (sweeps * (layers + 1))
    relax = [statistics.median(found[1:-1] or found[-1:]) + rest for found in calls]
    return Costs([found[0] + rest for found in calls], relax, [found[-1] + rest for found in calls])


def draw(path: Path, timelines: Sequence[Sequence[Event]], costs: Costs, split: Sequence[int]) -> None:
    """One step of every process as measured, and GPipe's of backprop as computed, over the same seconds."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    begin = min(event[1] for line in timelines for event in line)
    micro = 4 * len(split)
    schedule = gpipe(costs, split, micro)
    figure = Figure(figsize=(13, 2.2 + 1.1 * len(split)), layout="constrained")
    above, below = figure.subplots(2, 1)
    blocks = sum(split)
    for rank, line in enumerate(timelines):
        for what, start, end in line:
            found = re.fullmatch(r"block (\d+)", what)
            shade = f"C{int(found[1]) % 10}" if found else {"wait": "white", "before": "0.6", "after": "0.3"}[what]
            above.broken_barh([(start - begin, end - start)], (rank - 0.4, 0.8), color=shade)
    for rank, line in enumerate(schedule):
        for what, start, end in line:
            shade = "C0" if what.startswith("forward") else "C1"
            below.broken_barh([(start, end - start)], (rank - 0.4, 0.8), facecolor=shade, edgecolor="white", lw=0.4)
    above.set_title("Measured: a step of predictive coding, state solver (one colour a block; white: waiting)")
    below.set_title(f"Computed from the same times: a step of backprop, GPipe with {micro} micro-batches")
    above.legend(handles=[Patch(color=f"C{i % 10}", label=f"block {i}") for i in range(min(blocks, 10))]
                 + [Patch(color="0.6", label="before"), Patch(color="0.3", label="after, with the loss")],
                 ncols=6, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25))  # fmt: skip
    below.legend(handles=[Patch(color="C0", label="forward"), Patch(color="C1", label="backward")], fontsize=7)
    for axes in (above, below):
        axes.set(yticks=range(len(split)), yticklabels=[f"process {rank}" for rank in range(len(split))],
                 xlabel="seconds")  # fmt: skip
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
