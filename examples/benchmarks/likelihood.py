"""What each way to learn makes of a model, by a plain forward pass and by the model's own likelihood.

    python examples/benchmarks/likelihood.py --train_file text.txt --precision 1.5

A small GPT-2 that backprop has trained on the characters of a text learns on: by backprop, by rules of
`hf_pc.learning` and by the solver langevin, all at one precision or one relative_std, each with the learning rate that
does best on validation text with the first seed. Prints one JSON line per method and seed, and one per method: on
windows of test text the loss of a forward pass, L(0), and -log p(y), the mean over all errors of what the output says
(see marginal.py), both in nats per token, and both less backprop's with the same seeds, with Student's 95% interval.
`--backprop_steps 0` begins from random weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from characters import characters
from language import Text, arguments, chosen, drawn, gap, gpt2, loss_of, train, tuned, windows
from marginal import config_of, likelihood
from options import natural, positive
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel

from hf_pc import PCConfig, PCModel

BACKPROP_RATE = 6e-3
DEFAULTS = {"steps": 500, "batch": 8, "layers": 2, "hidden": 16, "heads": 2, "sequence": 8, "sweeps": 8, "seeds": 3,
            "learning_rates": [3e-3, 6e-3], "methods": None}  # fmt: skip
METHODS = ("plain", "one_sided", "wake_sleep", "langevin")
MEASURES = ("mean_pass", "marginal")
FACTS = ("relaxed_fraction", "residual", "refused")


def strength(args: argparse.Namespace) -> dict[str, float]:
    return {"precision": args.precision} if args.relative_std is None else {"relative_std": args.relative_std}


def measured(model: GPT2LMHeadModel, text: Text, args: argparse.Namespace) -> dict[str, float]:
    """Both losses on windows of the test text, nats per token."""
    model.zero_grad()
    model.to(torch.float64).eval()
    batches = list(windows(text.test, args.sequence, args.batch, args.batches, 99))
    pc = PCModel(model, PCConfig(sweeps=30, **strength(args)))  # type: ignore[arg-type]
    for batch in batches:
        pc.accumulate_grad(**batch)
    pc.steer()  # takes up the activity, which relative_std is counted in
    generator = torch.Generator().manual_seed(0)
    losses: dict[str, list[float]] = {name: [] for name in MEASURES}
    for batch in tqdm(batches, desc="likelihood", leave=False):
        model.zero_grad()
        losses["mean_pass"].append(pc.backprop_loss(batch).item())
        losses["marginal"].append(likelihood(model, pc, batch, args.samples, generator)[1])
    pc.detach()
    return {name: statistics.fmean(values) for name, values in losses.items()}


def by_backprop(text: Text, args: argparse.Namespace, seed: int) -> dict[str, Tensor]:
    """The weights that every method begins with."""
    model, steps = gpt2(args, text.vocabulary, seed, torch.device("cpu")), args.backprop_steps
    given = windows(text.train, args.sequence, args.batch, steps, seed + 1000)
    train(model, None, given, steps, BACKPROP_RATE, f"backprop first, seed {seed}")
    return model.state_dict()


def run(
    name: str,
    config: PCConfig | None,
    text: Text,
    args: argparse.Namespace,
    start: Callable[[int], dict[str, Tensor]],
) -> tuple[list[dict[str, Any]], dict[float, float]]:
    """A line for each seed, whose weights `start` gives, and the validation loss of each rate with the first."""

    def trained(seed: int, rate: float) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
        model = gpt2(args, text.vocabulary, seed, torch.device("cpu"))
        if args.backprop_steps:
            model.load_state_dict(start(seed))
        facts = train(model, config, drawn(text, args, seed), args.steps, rate, f"{name}, seed {seed}, {rate:g}")
        return model, {name: facts[name] for name in FACTS if name in facts}

    best, losses, seeds = tuned(trained, lambda found: loss_of(found[0], text.validation, args.sequence), args)
    lines = []
    for seed, (model, facts) in enumerate(seeds, args.first_seed):
        found = measured(model, text, args)
        lines.append({"method": name, "seed": seed, "learning_rate": best, **found, **facts})
        print(json.dumps(lines[-1]), flush=True)
    return lines, losses


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--precision", type=float, default=1.5, help="1/sigma^2 of the errors")
    parser.add_argument("--relative_std", type=float, help="instead: sigma as a multiple of each node's activity")
    parser.add_argument("--backprop_steps", type=natural, default=1000, help=f"before, at {BACKPROP_RATE:g}")
    parser.add_argument("--batches", type=positive, default=16)
    parser.add_argument("--samples", type=positive, default=2048, help="of the errors, for each sequence")
    parser.add_argument("--langevin_sweeps", type=positive, default=4)
    args = parser.parse_args(argv)
    configs = {name: config_of(name, strength(args), args) for name in METHODS}
    methods = chosen({"backprop": None, **configs}, args.methods)
    text = characters(args)
    names = ("backprop_steps", "steps", "batch", "layers", "hidden", "heads", "sequence", "batches", "samples")
    common: dict[str, Any] = strength(args) | {name: getattr(args, name) for name in names}
    common["machine"] = f"{platform.machine()} cpu, torch {torch.__version__}"
    backprop: list[dict[str, Any]] = []
    start = cache(partial(by_backprop, text, args))  # one run for all methods and rates
    lines = []
    for name, config in methods.items():
        seeds, losses = run(name, config, text, args, start)
        backprop = seeds if config is None else backprop
        line: dict[str, Any] = {"method": name, "learning_rate": seeds[0]["learning_rate"]}
        for measure in MEASURES:
            mine, its = ([seed[measure] for seed in found] for found in (seeds, backprop))
            line[measure] = statistics.fmean(mine)
            line[f"{measure}_spread"] = statistics.stdev(mine) if args.seeds > 1 else None
            line[f"{measure}_over_backprop"] = gap(mine, its) if its else None
        for fact in FACTS if config else ():
            line[fact] = statistics.fmean(seed[fact] for seed in seeds)
        lines.append(line | {"validation_loss_by_rate": {f"{r:g}": round(v, 4) for r, v in losses.items()}} | common)
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
