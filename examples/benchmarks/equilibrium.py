"""Learning at the equilibrium: each rule of `hf_pc.learning` against backprop, on the characters of a text.

    python examples/benchmarks/equilibrium.py --train_file text.txt --layers 6 --steps 1000 --seeds 3

Prints one JSON line per method and seed, and one with mean and spread per method: test perplexity of a plain forward
pass, the regime it was learned in, and the time of a step, all phases counted, over backprop's. Leaves a table, a
figure and the trainings: broken off and started again, it goes on where it was. Each method takes the learning rate,
of the same few, that does best on validation text with the first seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from characters import characters
from language import arguments, compare
from options import natural, positive

from hf_pc import PCConfig
from hf_pc.learning import RULES, cancels_in_each_sequence

DEFAULTS = {"steps": 1000, "batch": 16, "layers": 6, "hidden": 128, "heads": 4, "sequence": 64, "sweeps": 3,
            "seeds": 3, "learning_rates": [2e-3, 4e-3, 8e-3, 1.6e-2],
            "methods": None, "compile": False, "cuda_graph": False,
            "output_dir": Path("runs/equilibrium")}  # fmt: skip


def methods(args: argparse.Namespace) -> dict[str, PCConfig | None]:
    """Backprop; at every target of relaxed_fraction every rule, the solvers that move states, and incremental PC; at
    every relative_std plain learning that nothing steers, with that precision and with one that is learned from there.
    """
    found: dict[str, PCConfig | None] = {"backprop": None}
    for target in args.relaxed_fractions:
        common: dict[str, Any] = {"relaxed_fraction": target, "compile": args.compile}
        for rule, phases in RULES.items():
            found[f"{rule}_{target:g}"] = PCConfig(
                learning=rule,  # type: ignore[arg-type]
                strengths=args.strengths if rule == "one_sided" else None,
                bias_limit=args.bias_limit if cancels_in_each_sequence(phases) else None,
                sweeps=args.sweeps,
                anderson_depth=args.anderson_depth,
                tolerance=args.tolerance,
                cuda_graph=args.cuda_graph and rule != "wake_sleep",
                **common,
            )
        common["sweeps"] = args.state_sweeps
        for solver in ("state", "lagrangian"):
            found[f"{solver}_{target:g}"] = PCConfig(solver=solver, **common)
        found[f"incremental_{target:g}"] = PCConfig(solver="state", weight_update="every_sweep", **common)
    for std in args.relative_stds:
        for energy in ("gaussian", "learned_variance"):
            found[f"{energy}_{std:g}"] = PCConfig(
                energy=energy, relative_std=std, sweeps=args.sweeps, anderson_depth=args.anderson_depth,
                compile=args.compile,
            )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = arguments(__doc__, **DEFAULTS)
    parser.add_argument("--relaxed_fractions", type=float, nargs="*", default=[0.1, 0.3])
    parser.add_argument("--relative_stds", type=float, nargs="*", default=[], help="held, or learned from there")
    parser.add_argument("--state_sweeps", type=positive, default=20, help="of the solvers that move states")
    parser.add_argument("--strengths", type=float, nargs="+", help="of one_sided, from 1 down")
    parser.add_argument("--bias_limit", type=float, help="of the rules whose phases cancel in each sequence")
    parser.add_argument("--anderson_depth", type=natural, default=1, help="of the rules of learning")
    parser.add_argument("--tolerance", type=float, default=0.0, help="residual under which a phase of a rule ends")
    args = parser.parse_args(argv)
    return compare(methods(args), characters(args), args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
