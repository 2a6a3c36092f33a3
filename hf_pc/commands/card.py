"""`hf-pc card RUN_DIR`: the model card of a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_pc.auto_classes import CAUSAL, TASKS
from hf_pc.cards import write_card
from hf_pc.commands.runs import read
from hf_pc.config import PCConfig

HELP = "write the model card of a finished run"
EXAMPLE = 'hf-pc card runs/clm --dataset "Tiny Shakespeare" --overwrite'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a folder with all_results.json and pc_config.json")
    parser.add_argument("--dataset", help="what it learned from, in words; default: what the run noted")
    parser.add_argument("--dataset_id", help="its repository on the Hub; default: what the run noted")
    parser.add_argument("--notes", default="", help="a paragraph of yours")
    parser.add_argument("--base_model", help="the checkpoint that was fine-tuned; default: what the run noted")
    parser.add_argument("--auto_class", choices=list(TASKS), help="what loads it; default: what the run noted")
    parser.add_argument("--overwrite", action="store_true", help="replace the README.md that is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not args.run.is_dir():
        raise FileNotFoundError(f"{args.run}: there is no such folder")
    results = read(args.run / "all_results.json")
    missing = {"pc_eval_loss"} - results.keys()
    if missing or not results.keys() & {"pc_perplexity", "pc_accuracy"}:
        raise ValueError(f"{args.run / 'all_results.json'} has no pc_eval_loss with pc_perplexity or pc_accuracy: "
                         "evaluate the run first")  # fmt: skip
    config = PCConfig.from_pretrained(args.run)
    if (args.run / "README.md").exists() and not args.overwrite:
        raise ValueError(f"{args.run / 'README.md'} is there already: give --overwrite to replace it")
    if args.base_model:
        results.pop("base_on_hub", None)  # of what the run noted
    if args.dataset or args.dataset_id:
        results |= {"dataset": args.dataset, "dataset_id": args.dataset_id}
    noted = results.get("auto_class")
    auto_class = args.auto_class or (noted if noted in list(TASKS) else CAUSAL)
    try:
        path = write_card(
            args.run, config, results, model_name=args.run.resolve().name,
            base_model=args.base_model or results.get("base_model", ""),
            dataset=results.get("dataset") or results.get("dataset_id") or "a local text",
            dataset_id=results.get("dataset_id"), notes=args.notes, auto_class=auto_class,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{args.run / 'all_results.json'} holds what no run writes: {error}") from error
    return {"card": str(path)}


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    print(found["card"])
