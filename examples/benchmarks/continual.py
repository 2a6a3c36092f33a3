"""Continual learning: two texts in turn, backprop against predictive coding; what is forgotten of the first.

    python examples/benchmarks/continual.py --train_file text.txt

The second text is the Python language reference, or --second_file. Prints one JSON line per method and seed with the
test perplexity of both texts after each half, and one per method with means, spreads and the regime. Each method takes
the learning rate, of the same few, with the lowest validation loss over both texts at the end, at the first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from language import Text, arguments, chosen, drawn, gpt2, loss_of, split, train, tuned
from regimes import SIZE, methods

from hf_pc import PCConfig
from hf_pc.measurements import regime

DEFAULTS = SIZE | {"steps": 400, "batch": 8}


def texts(args: argparse.Namespace) -> tuple[Text, Text]:
    """Both texts as characters of one alphabet."""
    first = split(args)
    if args.second_file:
        second = split(argparse.Namespace(train_file=args.second_file))
    else:
        from pydoc_data.topics import topics

        whole = "\n".join(topics[name] for name in sorted(topics))
        cuts = int(0.9 * len(whole)), int(0.95 * len(whole))
        second = whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]
    index = {character: i for i, character in enumerate(sorted({*first[0], *second[0]}))}

    def encode(parts: tuple[str, str, str]) -> Text:
        return Text(*(torch.tensor([index.get(c, 0) for c in part]) for part in parts), vocabulary=len(index))

    return encode(first), encode(second)


def run(
    config: PCConfig | None, both: tuple[Text, Text], args: argparse.Namespace, seed: int, rate: float
) -> dict[str, Any]:
    """Learn one text, then the other, each with its own warm-up and schedule."""
    model = gpt2(args, both[0].vocabulary, seed, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, Any] = {"learning_rate": rate}
    facts: list[dict[str, Any]] = []
    for half, text in zip(("first", "second"), both, strict=True):
        facts.append(train(model, config, drawn(text, args, seed), args.steps, rate, f"{half} text"))
        for name, tested in zip(("first", "second"), both, strict=True):
            found[f"{name}_after_{half}"] = math.exp(min(700.0, loss_of(model, tested.test, args.sequence)))
    found["forgotten_nats"] = math.log(found["first_after_second"] / found["first_after_first"])
    loss = statistics.fmean(loss_of(model, text.validation, args.sequence) for text in both)
    found["validation_loss"] = loss if math.isfinite(loss) else math.inf
    for name in ("relaxed_fraction", "residual") if config else ():
        found[name] = statistics.fmean(half[name] for half in facts)
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--second_file", type=Path, help="another text, UTF-8")
    args = parser.parse_args(argv)
    both = texts(args)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    lines = []
    for name, config in chosen(methods(args.sweeps), args.methods).items():
        rate, _, seeds = tuned(partial(run, config, both, args), lambda facts: facts["validation_loss"], args)
        found = list(seeds)
        for seed, facts in enumerate(found, args.first_seed):
            print(json.dumps({"method": name, "seed": seed, **facts}), flush=True)
        line: dict[str, Any] = {"method": name, "learning_rate": rate, "steps": args.steps, "machine": machine}
        for key in found[0].keys() - {"learning_rate"}:
            values = [facts[key] for facts in found]
            line[key] = statistics.fmean(values)
            if len(values) > 1:
                line[f"{key}_spread"] = statistics.stdev(values)
        lines.append(line | ({"regime": regime(line["relaxed_fraction"], line["residual"])} if config else {}))
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
