"""`hf-pc doctor MODEL`: whether a model can be trained by predictive coding, what a step costs, what would fail."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_pc.architecture import layer_drop, positions
from hf_pc.checks import check_flags
from hf_pc.commands.loading import add_model_arguments, from_config, model_class, random_batch, read_config
from hf_pc.commands.waiting import stages
from hf_pc.config import PCConfig
from hf_pc.diagnostics import compare_with_backprop, largest_curvature
from hf_pc.diagnostics.curvature import RUNAWAY
from hf_pc.learning import cost
from hf_pc.measurements import regime
from hf_pc.model import PCModel
from hf_pc.output import Output
from hf_pc.own_loss import OTHER_TASK, SAME, compare_with_own_loss
from hf_pc.placement import resolve

HELP = "check a model: its own loss, gradients at T = 1, curvature, time and memory of a step, what would fail"
EXAMPLE = "hf-pc doctor runs/clm --sweeps 3 --batch 8 --sequence 128"
ONE_SWEEP = "gradient at T = 1 against backprop's"
OK, WARNING, FAILED = "ok", "warning", "failed"
#: largest deviation of a parameter's gradient from backprop's that rounding explains
ROUNDING = 1e-3
STEERING_STEPS = 8
#: copies of every node's state that a relaxation holds: the error, the best one, two directions
COPIES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--relaxed_fraction", type=float, default=0.03)
    parser.add_argument("--batch", type=int, default=4, help="sequences of the random batch it tries")
    parser.add_argument("--sequence", type=int, default=32, help="tokens of each")
    parser.add_argument("--random_weights", action="store_true", help="read the configuration alone")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per check: what, value, verdict, explanation."""
    check_flags(args, {"batch": 1, "sequence": 2})
    config = PCConfig(nodes=args.nodes, sweeps=args.sweeps, relaxed_fraction=args.relaxed_fraction)
    with stages(7) as begin:
        begin("loading the model")
        model = _load(args).eval()
        room = positions(model)
        if model.main_input_name != "pixel_values" and room is not None and room < args.sequence:
            raise ValueError(f"--sequence {args.sequence} is over the {room} positions of the model")
        batch = random_batch(model, args.batch, args.sequence)
        begin("gradients at T = 1")
        rows = [_nodes(model, config), _loss(model, batch)]
        rows.append(_tried(ONE_SWEEP, partial(_one_sweep, model, config, batch)))
        pc = PCModel(model, config)
        try:
            for check in (_relaxation, _curvature, _time, _memory):
                name = check.__name__.strip("_")
                begin(name)
                rows.append(_tried(name, partial(check, pc, batch)))
        finally:
            pc.detach()
        begin("other nodes")
        return rows + _presets(model, config, batch) + _warnings(model)


def failed(rows: list[dict[str, Any]]) -> bool:
    return any(row["verdict"] == FAILED for row in rows)


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{Path(args.model).name}, {args.sweeps} sweeps")
    for column in ("check", "value", "verdict", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        value = f"{row['value']:.3g}" if isinstance(row["value"], float) else str(row["value"])
        table.add_row(row["check"], value, row["verdict"], row["note"])
    Console().print(table)


def _row(check: str, value: Any, verdict: str, note: str = "") -> dict[str, Any]:
    return {"check": check, "value": value, "verdict": verdict, "note": note}


def _tried(check: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a check finds; a failed one where the model's own code raises."""
    try:
        return find()
    except ValueError:  # ours, which say what to do
        raise
    except Exception as error:
        return _row(check, "does not work", FAILED, f"{type(error).__name__}: {error}")


def _load(args: argparse.Namespace) -> Any:
    config = read_config(args)
    if not args.random_weights:
        return model_class(args, config).from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    torch.manual_seed(0)
    return from_config(args, config)


def _nodes(model: Any, config: PCConfig) -> dict[str, Any]:
    nodes = resolve(model, config)
    return _row("nodes", len(nodes), OK, f"{nodes[0].name} to {nodes[-1].name}")


def _loss(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    found = compare_with_own_loss(model, batch, Output.of(model))
    verdict = {SAME: OK, OTHER_TASK: FAILED}.get(found.verdict, WARNING)
    return _row("output energy against the model's own loss", found.verdict, verdict, found.text)


def _one_sweep(model: Any, config: PCConfig, batch: dict[str, Any]) -> dict[str, Any]:
    pc = PCModel(model, PCConfig(nodes=config.nodes, sweeps=1))
    try:
        # by module: a bias whose gradient is zero but for rounding, as those of keys, has no direction
        found = compare_with_backprop(pc, batch, group=lambda name: name.rpartition(".")[0])
    finally:
        pc.detach()
    deviations = {
        name: max(abs(facts["norm_ratio"] - 1), 1 - facts["cosine"]) for name, facts in found.items()
        if facts["norm_ratio"] != 0 or facts["backprop_norm"] > 0  # else this batch reaches it by neither
    }  # fmt: skip
    if not deviations:
        return _row(ONE_SWEEP, 0.0, FAILED, "no parameter has a gradient")
    worst = max(deviations, key=lambda name: deviations[name])
    deviation = deviations[worst]
    verdict = OK if deviation < ROUNDING else FAILED  # also where it is not a number
    return _row(ONE_SWEEP, deviation, verdict, f"largest deviation, at {worst}")


def _relaxation(pc: PCModel, batch: dict[str, Any]) -> dict[str, Any]:
    for _ in range(STEERING_STEPS):
        found = pc.accumulate_grad(**batch)
        pc.steer()
    pc.model.zero_grad()
    name = regime(found.relaxed_fraction, found.residual)
    note = f"relaxed_fraction {found.relaxed_fraction:.3g}, residual {found.residual:.3g}"
    return _row("regime on random tokens", name, WARNING if name == "relaxing" else OK, note)


def _curvature(pc: PCModel, batch: dict[str, Any]) -> dict[str, Any]:
    found = largest_curvature(pc, batch)
    note = f"in precisions; a fixed step is stable under {2 / found:.3g}" if found > 0 else "no curvature"
    return _row("largest curvature of the free energy", found, OK if found < RUNAWAY else WARNING, note)


def _seconds(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _time(pc: PCModel, batch: dict[str, Any]) -> dict[str, Any]:
    pairs = []
    for _ in range(4):
        own = _seconds(lambda: pc.accumulate_grad(**batch))
        backprop = _seconds(lambda: pc.backprop_loss(batch).backward())  # type: ignore[no-untyped-call]
        pairs.append((own, backprop))
    pc.model.zero_grad()
    ratio = statistics.median(own / backprop for own, backprop in pairs[1:])
    limit = cost(pc.phases, pc.config.sweeps)
    seconds = statistics.median(own for own, _ in pairs[1:])
    note = f"{seconds:.3g} s for this batch; in theory {limit:.3g}"
    return _row("time of a step over backprop's", ratio, OK if ratio < 1.5 * limit else WARNING, note)


def _memory(pc: PCModel, batch: dict[str, Any]) -> dict[str, Any]:
    relaxed = pc.relax(**batch)
    rows = len(batch["labels"])
    errors = COPIES * sum(e.numel() * e.element_size() for e in relaxed.errors.values()) / rows
    weights = sum(p.numel() * p.element_size() for p in pc.model.parameters())
    learned = sum(p.numel() * p.element_size() for p in pc.model.parameters() if p.requires_grad)
    note = (
        f"MiB a sequence for errors; weights {weights / 2**20:.3g}, their gradients and Adam {3 * learned / 2**20:.3g}"
    )
    return _row("memory that relaxation adds", errors / 2**20, OK, note)


def _presets(model: Any, config: PCConfig, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """What else could be nodes: every preset, and the attention logits."""
    tries: dict[str, dict[str, Any]] = {
        f"nodes={name!r}": {"nodes": name} for name in ("block", "sublayer", "linear") if name != config.nodes
    }
    tries["attention_energy='categorical'"] = {"nodes": config.nodes, "attention_energy": "categorical"}
    rows = []
    for name, settings in tries.items():
        try:
            pc = PCModel(model, PCConfig(sweeps=2, relative_std=0.1, **settings))
            try:
                pc.relax(**batch)
            finally:
                pc.detach()
        except (ValueError, RuntimeError, TypeError) as error:
            rows.append(_row(name, "does not work", WARNING, str(error).splitlines()[0]))
        else:
            rows.append(_row(name, "works", OK))
    return rows


def _warnings(model: Any) -> list[dict[str, Any]]:
    drop = layer_drop(model)
    return [] if drop is None else [_row("several processes", drop, WARNING, "would be refused: set it to 0")]
