"""`hf-pc compare MODEL --train_file F`: predictive coding against backprop on a text, from the same start."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, default_data_collator

from hf_pc.checks import check_flags
from hf_pc.commands.loading import add_model_arguments, refuse_adapter
from hf_pc.comparison import run as train_both
from hf_pc.comparison import show as show_table
from hf_pc.config import PCConfig
from hf_pc.learning import RULES
from hf_pc.solvers import SOLVERS
from hf_pc.text import blocks_of, check_file, choose_block_size, hold_out, load_files
from hf_pc.trainer import PCTrainingArguments

HELP = "train a language model by predictive coding and by backprop: table and figure"
EXAMPLE = "hf-pc compare runs/clm --train_file text.txt --steps 200 --learning_rate 1e-3"
#: least value of each number
LEAST = {"steps": 1, "batch": 1, "block_size": 2, "validation_percentage": 1, "seed": 0}
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, any_class=False)
    text = parser.add_argument_group("text")
    text.add_argument("--train_file", required=True, help="a text, JSON lines or CSV file, UTF-8")
    text.add_argument("--validation_file", help="the same, to validate on")
    text.add_argument("--validation_percentage", type=int, default=10, help="held out where there is none (10)")
    text.add_argument("--tokenizer", help="a folder or a Hub repository; default: the model's own")
    text.add_argument("--block_size", type=int, help="tokens per sequence; default: the model's, at most 1024")
    training = parser.add_argument_group("training, the same for both")
    training.add_argument("--steps", type=int, default=200, help="optimiser steps (200)")
    training.add_argument("--batch", type=int, default=8, help="sequences per step (8)")
    training.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW, cosine after a warm-up (1e-3)")
    training.add_argument("--seed", type=int, default=42)
    training.add_argument("--random_weights", action="store_true", help="start from the configuration alone")
    coding = parser.add_argument_group("predictive coding")
    coding.add_argument("--sweeps", type=int, default=3, help="passes per relaxation (3)")
    strength = coding.add_mutually_exclusive_group()
    strength.add_argument("--relaxed_fraction", type=float, help="strength of relaxation (0.03)")
    strength.add_argument("--relative_std", type=float, help="instead: sigma as a multiple of each node's activity")
    strength.add_argument("--precision", type=float, help="instead: 1/sigma^2 of every error, as langevin has it best")
    coding.add_argument("--learning", default="plain", choices=list(RULES), help="what the weights learn from")
    coding.add_argument("--strengths", type=float, nargs="+", help="of one_sided, from 1 down (1 0.5 0.25 0.125)")
    coding.add_argument("--bias_limit", type=float, help="the most signal_bias that steering allows (no limit)")
    coding.add_argument("--anderson_depth", type=int, default=1, help="moves that the acceleration remembers (1)")
    coding.add_argument("--solver", default="error", choices=SOLVERS.names(), help="how the errors relax")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare"), help="where everything goes")
    parser.add_argument("--overwrite", action="store_true", help="write into an output_dir that holds something")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of both sides, and where the picture and the checkpoint of PC are."""
    _check(args)
    config = PCConfig(nodes=args.nodes, sweeps=args.sweeps, relaxed_fraction=args.relaxed_fraction,
                      relative_std=args.relative_std, precision=args.precision, learning=args.learning,
                      strengths=args.strengths, bias_limit=args.bias_limit, anderson_depth=args.anderson_depth,
                      solver=args.solver)  # fmt: skip
    torch.manual_seed(args.seed)
    tokenizer = _tokenizer(args)
    scratch = args.random_weights or _has_no_weights(Path(args.model))
    model = _model(args, scratch)
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{args.model} has {vocabulary} embeddings for the {len(tokenizer)} tokens of its tokenizer: "
            "give a --tokenizer that fits"
        )
    text = hold_out(load_files(args.train_file, args.validation_file), args.validation_percentage)
    data = blocks_of(text, tokenizer, choose_block_size(args.block_size, model, tokenizer))
    options = {"train_dataset": data["train"], "eval_dataset": data["validation"],
               "data_collator": default_data_collator}  # fmt: skip
    card = {"base_model": None if scratch else args.model, "dataset": Path(args.train_file).name}
    with redirect_stdout(sys.stderr):  # where transformers prints a log, if it shows no bars
        figures, _ = train_both(model, _training(args), config, options, compare_bp=True, card=card,
                                processing_class=tokenizer, table=False)  # fmt: skip
    return figures | {"figure": str(args.output_dir / "learning.png"), "checkpoint": str(args.output_dir)}


def failed(found: dict[str, Any]) -> bool:
    """Whether a side has diverged."""
    return not (math.isfinite(found["pc_eval_loss"]) and math.isfinite(found["bp_eval_loss"]))


def show(found: dict[str, Any], args: argparse.Namespace) -> None:
    show_table(found)
    print(f"figure: {found['figure']}\ncheckpoint of PC: {found['checkpoint']}")


def _check(args: argparse.Namespace) -> None:
    check_flags(args, LEAST)
    if args.validation_percentage > 99:
        raise ValueError(f"--validation_percentage {args.validation_percentage} is not allowed: 1 to 99 is needed")
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"--learning_rate {args.learning_rate} is not allowed: a number above 0 is needed")
    for name in ("train_file", "validation_file"):
        if (path := getattr(args, name)) is not None:
            check_file(name, Path(path))
    folder: Path = args.output_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: a folder is needed")
    if Path(args.model).exists() and folder.resolve() == Path(args.model).resolve():
        raise ValueError(f"--output_dir {folder} is the model's own folder: give another")
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise ValueError(f"--output_dir {folder} holds something already: give another, or --overwrite")


def _has_no_weights(path: Path) -> bool:
    """Whether it is a folder with a configuration alone; what is no folder is a repository of the Hub."""
    return path.is_dir() and not any(f for end in ("*.safetensors*", "*.bin*") for f in path.glob(end))


def _tokenizer(args: argparse.Namespace) -> Any:
    source = args.tokenizer or args.model
    if Path(source).is_dir() and not any(f for name in TOKENIZERS for f in Path(source).glob(name)):
        raise ValueError(f"{source} holds no tokenizer: save one there, or give --tokenizer")
    return AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)


def _model(args: argparse.Namespace, scratch: bool) -> Any:
    refuse_adapter(args)
    code = {"trust_remote_code": args.trust_remote_code}
    if scratch:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model, **code), **code).float()
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **code)


def _training(args: argparse.Namespace) -> PCTrainingArguments:
    return PCTrainingArguments(
        output_dir=str(args.output_dir), max_steps=args.steps, seed=args.seed, learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch, per_device_eval_batch_size=2 * args.batch,
        lr_scheduler_type="cosine", warmup_steps=args.steps // 10, logging_steps=max(1, args.steps // 40),
        eval_strategy="steps", eval_steps=max(1, args.steps // 8), save_strategy="no", report_to=[],
        do_train=True, do_eval=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
