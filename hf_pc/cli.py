"""`hf-pc`: `hf-pc nodes MODEL` prints the nodes that a preset puts on a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pc.attention import AttentionNodes
from hf_pc.config import PCConfig
from hf_pc.energies import ENERGIES
from hf_pc.node import Node
from hf_pc.placement import resolve

EXAMPLE = "example: hf-pc nodes runs/clm --nodes linear --relative_std 0.2"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-pc", description="Predictive coding for Hugging Face models.")
    commands = parser.add_subparsers(dest="command", required=True)
    nodes = commands.add_parser("nodes", help="list the nodes that a preset puts on a model", epilog=EXAMPLE)
    nodes.add_argument("model", help="a folder or a Hub repository; only its configuration is read")
    nodes.add_argument("--nodes", default="block", help="preset or pattern, several separated by commas")
    nodes.add_argument("--energy", default="gaussian", help="energy of the nodes")
    nodes.add_argument("--attention_energy", help="energy of attention logits, which are no nodes without it")
    strength = nodes.add_mutually_exclusive_group()
    for name in ("precision", "relative_std", "relaxed_fraction"):
        strength.add_argument(f"--{name}", type=float)
    nodes.add_argument("--auto_class", default="AutoModelForCausalLM", help="class of transformers to build")
    nodes.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    nodes.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


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
            model.eval()(**_example(model))
    finally:
        for handle in handles:
            handle.remove()
        if attention:
            attention.detach()
            attention.check()
    return shapes


def _example(model: Any) -> dict[str, Tensor]:
    """The smallest input of a model: two tokens, or one image."""
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = [size, size] if isinstance(size, int) else list(size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), *sides, device=device)}
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def list_nodes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per node: name, module, shape per token, energy, precision.

    Raises:
        ValueError: the settings do not fit the model, or `auto_class` is unknown.
        OSError: there is no such model.
    """
    import transformers

    strengths = {name: getattr(args, name) for name in ("precision", "relative_std", "relaxed_fraction")}
    config = PCConfig(nodes=args.nodes, energy=args.energy, attention_energy=args.attention_energy, **strengths)
    auto_class = getattr(transformers, args.auto_class, None)
    if not args.auto_class.startswith("AutoModel") or auto_class is None:
        raise ValueError(f"--auto_class {args.auto_class!r} is no AutoModel class of transformers")
    model_config = transformers.AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):  # shapes alone: nothing is allocated
        model = auto_class.from_config(model_config, trust_remote_code=args.trust_remote_code)
    nodes = resolve(model, config)
    attention = AttentionNodes(model, config.attention_energy) if config.attention_energy else None
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


def _print(rows: list[dict[str, Any]], model: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(rows)} nodes on {Path(model).name}")
    for column in ("name", "module", "shape per token", "energy", "precision"):
        table.add_column(column, overflow="fold")
    for row in rows:
        shape = "not reached" if row["shape"] is None else " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], row["module"], shape, row["energy"], row["precision"])
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 where an argument is wrong or there is no such model."""
    args = _parser().parse_args(argv)
    try:
        rows = list_nodes(args)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        print(f"hf-pc: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(rows))
    else:
        _print(rows, args.model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
