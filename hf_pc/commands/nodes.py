"""`hf-pc nodes MODEL`: the nodes that a preset puts on a model, from its configuration alone."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pc.attention import AttentionNodes
from hf_pc.commands.loading import add_model_arguments, smallest_input, without_weights
from hf_pc.commands.waiting import stages
from hf_pc.config import PCConfig
from hf_pc.energies import ENERGIES
from hf_pc.node import Node
from hf_pc.placement import resolve

logger = logging.getLogger(__name__)
HELP = "list the nodes that a preset puts on a model"
EXAMPLE = "hf-pc nodes runs/clm --nodes linear --relative_std 0.2"
STRENGTHS = ("precision", "relative_std", "relaxed_fraction")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--energy", default="gaussian", help="energy of the nodes")
    parser.add_argument("--attention_energy", help="energy of attention logits, which are no nodes without it")
    strength = parser.add_mutually_exclusive_group()
    for name in STRENGTHS:
        strength.add_argument(f"--{name}", type=float)


def _strength(config: PCConfig, node: Node) -> str:
    if node.precision is not None or config.precision is not None:
        return f"{node.precision if node.precision is not None else config.precision:g}"
    if config.relative_std is not None:
        return f"1 / ({config.relative_std:g} RMS)^2"
    return f"steered to relaxed_fraction {config.relaxed_fraction:g}"


def _shapes(model: Any, nodes: Sequence[Node], attention: AttentionNodes | None) -> dict[str, list[int]]:
    """Shape per token of each node, from one forward pass over one sequence of two tokens; of logits, per query."""
    shapes: dict[str, list[int]] = {}

    def note(node: Node, mu: Tensor) -> None:
        if node.name.endswith(".logits") and mu.dim() == 4:
            shapes[node.name] = list(mu.shape[1:2])  # heads: the keys are as many as the sequence has
            return
        shapes[node.name] = list(mu.shape[1 if len(mu) == 2 and mu.dim() == 2 else 2 :])

    handles = [node.attach(note) for node in nodes]
    if attention:
        attention.attach(note)
    try:
        with torch.no_grad():
            model.eval()(**smallest_input(model))
    except Exception as error:  # names need no pass, which may fail where nothing is allocated
        logger.warning("no shapes: %s", error)
    else:
        if attention:
            attention.check()
    finally:
        for handle in handles:
            handle.remove()
        if attention:
            attention.detach()
    return shapes


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per node: name, module, shape per token, energy, precision."""
    strengths = {name: getattr(args, name) for name in STRENGTHS}
    config = PCConfig(nodes=args.nodes, energy=args.energy, attention_energy=args.attention_energy, **strengths)
    with stages(2) as begin:
        begin("building the model without weights")
        model = without_weights(args)
        nodes = resolve(model, config)
        attention = AttentionNodes(model, config.attention_energy) if config.attention_energy else None
        begin("shapes")
        shapes = _shapes(model, nodes, attention)
    nodes += attention.nodes.values() if attention else []
    return [
        {
            "name": node.name,
            "module": type(node.module).__name__,
            "shape": shapes.get(node.name),
            "energy": ENERGIES.name_of(type(node.energy)),
            "precision": _strength(config, node),
        }
        for node in nodes
    ]


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} nodes on {Path(args.model).name}")
    for column in ("name", "module", "shape per token", "energy", "precision"):
        table.add_column(column, overflow="fold")
    for row in rows:
        shape = "not reached" if row["shape"] is None else " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["module"], shape, row["energy"], row["precision"])
    Console().print(table)
