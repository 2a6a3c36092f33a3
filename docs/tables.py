"""The tables of the pages, made from the JSON lines that the benchmarks printed.

    python examples/benchmarks/step_cost.py --checkpointing > docs/results/step_cost.jsonl
    python docs/tables.py            # fills every page's tables; with --check says which are not as they should be

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, of the lines in docs/results/NAME.jsonl and
the columns below; under it the machine they were measured on.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_pc.measurements import regime

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
Line = dict[str, Any]
Column = Callable[[Line], str]


def field(name: str, form: str = "") -> Column:
    return lambda line: format(line[name], form)


def with_quartiles(name: str) -> Column:
    """A median and the quartiles beside it, as `NAME_quartiles` has them."""
    return lambda line: "{:.2f} ({:.2f} to {:.2f})".format(line[name], *line[f"{name}_quartiles"])


def each(name: str, form: str) -> Column:
    """One value per process."""
    return lambda line: ", ".join(format(value, form) for value in line[name])


def spread(name: str, form: str = ".2f") -> Column:
    """A mean and the standard deviation over seeds, as `NAME_spread` has it."""
    return lambda line: f"{line[name]:{form}} ± {line[f'{name}_spread']:{form}}"


def of_pc(name: str, form: str = "") -> Column:
    """What backprop has none of."""
    return lambda line: format(line[name], form) if name in line else ""


def in_phases(name: str, form: str) -> Column:
    """One value per phase of a rule."""
    return lambda line: ", ".join(format(phase[name], form) for phase in line["phases"])


def _relaxed_by_share(line: Line) -> str:
    sizes = [abs(phase["share"]) for phase in line["phases"]]
    relaxed = [phase["relaxed_fraction"] for phase in line["phases"]]
    return format(sum(s * r for s, r in zip(sizes, relaxed, strict=True)) / sum(sizes), ".2f")


def _gap_of(name: str) -> Column:
    """Nats per token over backprop, and the interval."""

    def column(line: Line) -> str:
        gap = line[name]
        return "" if gap is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(gap["nats"], *gap["interval"])

    return column


def _both(name: str, form: str) -> Column:
    """Of PC and of backprop."""
    return lambda line: f"{line[name]['pc']:{form}}, {line[name]['backprop']:{form}}"


def over_seeds(lines: list[Line]) -> list[Line]:
    """One line for those of a method and rate: "perplexities" by seed, the mean regime, and of the first seed
    "validation_loss", which rates are chosen by."""
    groups: dict[tuple[str, float], list[Line]] = {}
    for line in sorted(lines, key=lambda line: (line["learning_rate"], line["seed"])):
        groups.setdefault((line["method"], line["learning_rate"]), []).append(line)
    merged = []
    for group in dict(sorted(groups.items())).values():
        line = group[0] | {"perplexities": [line["test_perplexity"] for line in group]}
        if "regime" in line:
            line |= {name: statistics.fmean(line[name] for line in group) for name in ("relaxed_fraction", "residual")}
            line["regime"] = regime(line["relaxed_fraction"], line["residual"])
        merged.append(line)
    return merged


def _by_seed(line: Line) -> str:
    return ", ".join(format(value, ".3f") for value in line["perplexities"])


def _mean_and_spread(line: Line) -> str:
    values = line["perplexities"]
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


#: tables with one line for each seed, and how these are made into rows
MERGED = {"context_256": over_seeds, "long": over_seeds}

RELAXED = {"relaxed_fraction": of_pc("relaxed_fraction", ".3f"), "residual": of_pc("residual", ".3f")}
REGIME = RELAXED | {"regime": of_pc("regime")}

METHODS: dict[str, Column] = {
    "method": lambda line: f"`{line['method']}`",
    "test perplexity": lambda line: f"{line['mean']:.2f} ± {line['spread']:.2f}",
    "gap to backprop": _gap_of("over_backprop"),
    **REGIME,
    "refused": of_pc("refused", ".1%"),
    "step over backprop's": field("step_time_ratio", ".1f"),
}

#: the regime of a single step, which may hardly relax
OF_A_STEP = {"relaxed_fraction": field("relaxed_fraction", ".4f"), "residual": field("residual", ".4f")}
MEMORY: dict[str, Column] = {
    "memory ratio": field("memory_ratio", ".2f"),
    "with checkpointing, PC": lambda line: format(line["memory_ratio_checkpointed"]["pc"], ".2f"),
    "backprop": lambda line: format(line["memory_ratio_checkpointed"]["backprop"], ".2f"),
}

TABLES: dict[str, dict[str, Column]] = {
    "step_cost": {
        "model": field("model"),
        "T": field("sweeps"),
        "time ratio": with_quartiles("time_ratio"),
        "limit": field("limit", ".2f"),
        "over": field("over_limit", ".1%"),
        "a pass": field("sweep_ratio", ".2f"),
        "beyond passes": field("over_passes", ".1%"),
        **MEMORY,
        **OF_A_STEP,
    },
    "step_cost_gpu": {
        "model": field("model"),
        "vocabulary": field("vocab"),
        "T": field("sweeps"),
        "time ratio": with_quartiles("time_ratio"),
        "compiled": field("time_ratio_compiled", ".2f"),
        "limit": field("limit", ".2f"),
        "ms: PC, backprop": _both("milliseconds", ".0f"),
        "compiled ": _both("milliseconds_compiled", ".0f"),
        **MEMORY,
        **OF_A_STEP,
    },
    "step_cost_1b": {
        "model": field("model"),
        "blocks": field("layers"),
        "width": field("hidden"),
        "tokens": lambda line: f"{line['batch']} x {line['sequence']}",
        "T": field("sweeps"),
        "time ratio": with_quartiles("time_ratio"),
        "limit": field("limit", ".2f"),
        "over": field("over_limit", ".1%"),
        "ms: PC, backprop": _both("milliseconds", ".0f"),
        "memory ratio": field("memory_ratio", ".2f"),
        "backprop, GiB": field("backprop_gib", ".1f"),
        **OF_A_STEP,
    },
    "context_256": {
        "method": lambda line: f"`{line['method']}`",
        "rate": field("learning_rate", "g"),
        "validation loss, first seed": field("validation_loss", ".4f"),
        "test perplexity by seed": _by_seed,
        "mean": _mean_and_spread,
        **REGIME,
    },
    "long": {
        "method": lambda line: f"`{line['method']}`",
        "test perplexity by seed": _by_seed,
        "mean": _mean_and_spread,
        **REGIME,
    },
    "half_limited": {
        "target": lambda line: format(line["settings"]["relaxed_fraction"], "g"),
        "T": lambda line: str(line["settings"]["sweeps"]),
        "strengths": lambda line: ", ".join(f"{strength:g}" for strength in line["settings"]["strengths"]),
        "sweeps a step": field("sweeps", ".1f"),
        "tolerance": lambda line: format(line["settings"].get("tolerance", 0.0), "g"),
        "limit": lambda line: format(line["settings"]["bias_limit"], "g"),
        "seed": field("seed"),
        "perplexity": field("test_perplexity", ".3f"),
        "relaxed_fraction": field("relaxed_fraction", ".3f"),
        "residual": field("residual", ".3f"),
        "`signal_bias`": field("signal_bias", ".3f"),
        "refused": field("refused", ".1%"),
        "regime": field("regime"),
    },
    "half": {
        "rate": field("learning_rate", "g"),
        "seed": field("seed"),
        "perplexity": field("test_perplexity", ".3f"),
        "relaxed_fraction": field("relaxed_fraction", ".3f"),
        "residual": field("residual", ".3f"),
        "refused": field("refused", ".1%"),
    },
    "state_memory": {
        "model": field("model"),
        "blocks": field("layers"),
        "width": field("hidden"),
        "sequence": field("sequence"),
        "T": field("sweeps"),
        "memory ratio": field("memory_ratio", ".2f"),
        **OF_A_STEP,
    },
    "relaxation_dtype": {
        "rule": lambda line: f"`{line['rule']}`",
        "target": field("target", "g"),
        "sweeps run in": lambda line: line["relaxation_dtype"] or "float32",
        "distance to backprop": field("distance", ".4f"),
        "change": field("change", ".4f"),
        "relaxed_fraction": field("relaxed_fraction", ".3f"),
        "residual": field("residual", ".3f"),
    },
    "strengths": {
        "target": field("target", "g"),
        "T": field("sweeps"),
        "strengths": in_phases("strength", "g"),
        "distance to backprop": field("distance", ".3f"),
        "share of the gradient": in_phases("share", ".2f"),
        "relaxed_fraction": in_phases("relaxed_fraction", ".2f"),
        "mean": _relaxed_by_share,
        "residual": in_phases("residual", ".3f"),
    },
    "depths": {
        "target": field("target", "g"),
        "T": field("sweeps"),
        "`anderson_depth`": field("anderson_depth"),
        "refused": of_pc("refused", ".1%"),
        **RELAXED,
    },
    "marginal": {
        "target": field("target", "g"),
        "gradient": lambda line: f"`{line['gradient']}`",
        "distance to backprop": field("to_backprop", ".3f"),
        "to the marginal's": field("to_marginal", ".3f"),
        "cosine with backprop": field("cosine_to_backprop", ".3f"),
        "with the marginal's": field("cosine_to_marginal", ".3f"),
        "norm": field("norm", ".2f"),
        "noise": field("noise", ".2f"),
        **RELAXED,
    },
    "likelihood": {
        "method": lambda line: f"`{line['method']}`",
        "rate": field("learning_rate", "g"),
        "forward pass": spread("mean_pass", ".3f"),
        "less backprop's": _gap_of("mean_pass_over_backprop"),
        "own likelihood": spread("marginal", ".3f"),
        "less backprop's ": _gap_of("marginal_over_backprop"),
        **RELAXED,
    },
    "solvers": METHODS,
    "solvers_six": {
        "method": lambda line: f"`{line['method']}`",
        "test perplexity": field("mean", ".3f"),
        **REGIME,
        "refused": of_pc("refused", ".1%"),
        "step over backprop's": field("step_time_ratio", ".1f"),
    },
    "precision": METHODS,
    "continual": {
        "method": lambda line: f"`{line['method']}`",
        "rate": field("learning_rate", "g"),
        "first text after it": spread("first_after_first"),
        "second after it": spread("second_after_second"),
        "first after second": spread("first_after_second"),
        "forgotten, nats": spread("forgotten_nats", ".3f"),
        **REGIME,
    },
    "peers": {
        "library": field("library"),
        "nodes, step": lambda line: f"{line['coordinates']}, {line['step_size']}",
        "width, batch": lambda line: f"{line['sizes'][1]}, {line['batch']}",
        "T": field("T"),
        "step over own backprop": with_quartiles("time_ratio"),
        "ms": field("step_ms", ".1f"),
        "backprop, ms": field("backprop_ms", ".1f"),
        "relaxed": field("relaxed", ".3f"),
        "cosine": field("gradient_cosine", ".3f"),
    },
    "scaling": {
        "model": field("model"),
        "blocks": field("layers"),
        "width": field("hidden"),
        "split": each("split", "d"),
        "tokens": lambda line: f"{line['batch']} x {line['sequence']}",
        "vocabulary": field("vocab"),
        "T": field("sweeps"),
        "step": field("step_size", "g"),
        "speed": with_quartiles("speedup"),
        "one process, s": field("single_seconds", ".2f"),
        "processors give": lambda line: format(line["machine_speedup"], ".2f") if "machine_speedup" in line else "",
        "memory": each("memory_ratio", ".2f"),
        "waiting": each("idle_share", ".0%"),
        "MB": lambda line: ", ".join(f"{sent / 1e6:.1f}" for sent in line["bytes_per_sweep"]),
        "seconds, measured and predicted": lambda line: f"{line['seconds']:.2f}, {line['predicted_seconds']:.2f}",
        **OF_A_STEP,
    },
}


def table(name: str) -> str:
    """The table in Markdown, and the machine. Raises ValueError where its lines are missing or not whole."""
    path = RESULTS / f"{name}.jsonl"
    if name not in TABLES:
        raise ValueError(f"a page asks for the table {name!r}; allowed: {', '.join(TABLES)}")
    if not path.is_file():
        raise ValueError(f"the table {name!r} is made of docs/results/{path.name}, which there is not")
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    measured = [line for line in lines if line.get("measured", True)]
    rows: list[list[str]] = [list(TABLES[name]), ["---"] * len(TABLES[name])]
    try:
        rows += [[column(line) for column in TABLES[name].values()] for line in MERGED.get(name, list)(measured)]
        machines = "; ".join(dict.fromkeys(line["machine"] for line in measured))
    except KeyError as error:
        raise ValueError(f"docs/results/{path.name} has a line without {error}") from None
    except TypeError:
        raise ValueError(f"docs/results/{path.name} has a line of one run, without quartiles or spread") from None
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\nMachine: {machines}."


def filled(page: str) -> str:
    """A page with its tables as the results have them."""
    return re.sub(
        r"(<!-- table: ([^ ]+) -->\n)(?:(?!<!-- table:).)*?(<!-- end of table -->)",
        lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main(argv: list[str] | None = None) -> list[Path]:
    """Fill the pages; returned are those that were not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not as it should be")
    args = parser.parse_args(argv)
    pages = {page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    made = {page: filled(text) for page, text in pages.items()}
    changed = [page for page in pages if made[page] != pages[page]]
    for page in [] if args.check else changed:
        page.write_text(made[page], encoding="utf-8")
    if args.check and changed:
        raise ValueError(f"python docs/tables.py would change {', '.join(page.name for page in changed)}")
    return changed


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
