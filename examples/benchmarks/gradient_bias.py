"""How far the gradient of each rule of `hf_pc.learning` is from backprop's, at one relaxed_fraction.

    python examples/benchmarks/gradient_bias.py --train_file text.txt --steps 300

Trains a small GPT-2 on characters by backprop, then prints one JSON line per choice of nodes and rule: the norm of the
difference of the two gradients over that of backprop's, in float64, mean over a few batches. The precision is steered
to the target by plain learning first, with the weights held.

With `--relaxation_dtypes bfloat16 float16` all of it in float32, and a line for each of these too, whose "change" is
the distance of its gradient to that of the same rule relaxed in float32, over the norm of that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from typing import Any

import torch
from characters import characters
from language import Batch, arguments, drawn, gpt2, train, windows
from options import natural, positive
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from hf_pc import PCConfig, PCModel
from hf_pc.combinations import RELAXATION_DTYPES
from hf_pc.learning import RULES
from hf_pc.measurements import add_sums, summary

DEFAULTS = {"steps": 300, "batch": 16, "layers": 6, "hidden": 128, "heads": 4, "sequence": 64, "sweeps": 6}
STEERING_STEPS = 10


def gradient_of(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def by_backprop(args: argparse.Namespace, dtype: torch.dtype) -> tuple[GPT2LMHeadModel, list[Batch]]:
    """A GPT-2 that backprop has trained on the characters of a text, in evaluation, and batches of the same text."""
    text = characters(args)
    model = gpt2(args, text.vocabulary, 0, torch.device("cpu"))
    train(model, None, drawn(text, args, 0), args.steps, args.learning_rate, "backprop")
    model.zero_grad()
    model.to(dtype).eval()
    return model, list(windows(text.train, args.sequence, args.batch, args.batches, 99))


def steered_to(fraction: float, model: GPT2LMHeadModel, config: PCConfig, batches: list[Batch]) -> PCModel:
    """A PCModel, detached, whose strength plain learning on these batches has steered to a relaxed_fraction."""
    pc = PCModel(model, dataclasses.replace(config, relaxed_fraction=fraction))
    for _ in range(STEERING_STEPS):
        for batch in batches:
            pc.accumulate_grad(**batch)
        pc.steer()
    pc.detach()
    model.zero_grad()
    return pc


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    """|found - true| / |true|, mean over batches."""
    return statistics.fmean(float((f - t).norm() / t.norm()) for f, t in zip(found, true, strict=True))


def config_of(rule: str, nodes: str, dtype: str | None, args: argparse.Namespace) -> PCConfig:
    strengths = args.strengths if rule == "one_sided" else None
    return PCConfig(
        nodes,
        sweeps=args.sweeps,
        anderson_depth=args.anderson_depth,
        learning=rule,  # type: ignore[arg-type]
        strengths=strengths,
        relaxation_dtype=dtype,
    )


def regime(sums: dict[str, Tensor]) -> dict[str, Any]:
    found = summary(sums)
    return {name: found[name] for name in ("relaxed_fraction", "residual", "refused")}


def learn(pc: PCModel, batches: list[Batch]) -> tuple[list[Tensor], dict[str, Any]]:
    """The gradient of each batch; the regime, and of each phase how far it relaxes, and its share of the gradient."""
    gradients = []
    step: dict[str, Tensor] = {}
    apart: list[dict[str, Tensor]] = [{} for _ in pc.phases]
    for batch in batches:
        for phase, sums in zip(pc.phases, apart, strict=True):
            with pc.relaxed(batch, phase=phase) as relaxation:
                loss, _ = pc.learning_pass(batch)
                (loss / relaxation.tokens).backward()  # type: ignore[no-untyped-call]
                add_sums(step, pc.observe(relaxation))
                add_sums(sums, relaxation.sums())
        gradients.append(gradient_of(pc.model))
    phases = [{"strength": p.strength, "share": p.share, **regime(s)} for p, s in zip(pc.phases, apart, strict=True)]
    return gradients, regime(step) | {"phases": phases}


def measure(
    model: GPT2LMHeadModel, nodes: str, args: argparse.Namespace, batches: list[Batch]
) -> list[dict[str, Any]]:
    """One line per rule, for one choice of nodes."""
    steered = steered_to(args.relaxed_fraction, model, config_of("plain", nodes, None, args), batches)
    trues = []
    for batch in batches:
        steered.backprop_loss(batch).backward()  # type: ignore[no-untyped-call]
        trues.append(gradient_of(model))
    lines = []
    for rule in args.rules:
        same: list[Tensor] = []  # what the rule finds where it relaxes as it learns
        for dtype in (None, *args.relaxation_dtypes):
            pc = PCModel(model, config_of(rule, nodes, dtype, args))
            pc.load_state_dict(steered.state_dict())
            gradients, facts = learn(pc, batches)
            pc.detach()
            same = same or gradients
            lines.append({
                "nodes": nodes, "rule": rule, "relaxation_dtype": dtype, "target": args.relaxed_fraction,
                "distance": distance(gradients, trues), "change": distance(gradients, same),
                **facts, "sweeps": args.sweeps, "anderson_depth": args.anderson_depth,
                "batches": len(batches), "seed": 0,
                "machine": f"{platform.machine()} cpu, torch {torch.__version__}",
            })  # fmt: skip
            print(json.dumps(lines[-1]), flush=True)
    return lines


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--learning_rate", type=float, default=6e-3)
    parser.add_argument("--relaxed_fraction", type=float, default=0.1)
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=["plain", "centred", "extrapolated"])
    parser.add_argument("--strengths", type=float, nargs="+", help="of one_sided, from 1 down")
    parser.add_argument("--anderson_depth", type=natural, default=1, help="moves that the acceleration remembers")
    parser.add_argument("--nodes", nargs="+", default=["block"], help="presets or patterns, each measured by itself")
    parser.add_argument("--relaxation_dtypes", nargs="+", choices=RELAXATION_DTYPES, default=[], help="lines too")
    parser.add_argument("--batches", type=positive, default=3)
    args = parser.parse_args(argv)
    PCConfig(relaxed_fraction=args.relaxed_fraction)  # what it refuses is refused before the model is trained
    configs = [config_of(rule, nodes, None, args) for rule in args.rules for nodes in args.nodes]
    if args.strengths and not any(config.strengths for config in configs):
        raise ValueError(
            f"--strengths {args.strengths} are those of one_sided, which is not among --rules {args.rules}"
        )
    dtype = torch.float32 if args.relaxation_dtypes else torch.float64  # autocast leaves float64 alone
    model, batches = by_backprop(args, dtype)
    return [line for nodes in args.nodes for line in measure(model, nodes, args, batches)]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
