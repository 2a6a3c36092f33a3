"""What the examples of one task each share: how they start and end, their common flags and defaults, the accuracy."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_pc import PCConfig, PCTrainingArguments
from hf_pc.trainer import NonFiniteEnergyError

#: a small encoder without dropout, so that both sides see the same function
SMALL_ENCODER = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128,
}  # fmt: skip


@dataclass
class CommonArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint to start from."})
    compare_bp: bool = field(default=True, metadata={"help": "Train by backprop too, from the same start."})


@dataclass
class TaskTrainingArguments(PCTrainingArguments):
    output_dir: str = field(default="runs/task", metadata={"help": "Where everything goes."})
    use_cpu: bool = not torch.accelerator.is_available()
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'true' for the last."}
    )


#: where the settings of the demonstrations differ from those of TrainingArguments
DEMO: dict[str, Any] = {
    "do_train": True, "do_eval": True, "max_steps": 200, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 20,
    "logging_steps": 10, "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
}  # fmt: skip
#: a model, or data, of the user's: such a run is no demonstration
OWN = {"model_name_or_path", "config_name", "train_file", "dataset_name", "train_dir"}


def launch(main: Callable[[], Any]) -> None:
    """Run a script: what the user got wrong is one line, and the process group is left in order."""
    try:
        main()
    except (ValueError, OSError, NonFiniteEnergyError, StrictDataclassError) as error:
        raise SystemExit(f"error: {error}") from None
    PartialState().destroy_process_group()  # left to the interpreter's exit, it may abort it


def parse(
    kinds: tuple[Any, ...], argv: list[str] | None, demo: dict[str, Any] = DEMO, **defaults: Any
) -> tuple[Any, ...]:
    """The given dataclasses, the last a kind of TrainingArguments, and a PCConfig; sets the seed.

    Args:
        argv: flags, or the .json or .yaml file that holds them; None takes the command line's.
        demo: defaults where nothing of `OWN` is given, but for those that a given flag stands against.
        defaults: of this example, where they differ from the dataclasses'.
    """
    argv = flags(argv)
    given = _given(kinds, argv)
    parser = HfArgumentParser((*kinds, PCConfig))
    if not OWN & given.keys():
        outdone = {"max_steps"} if "num_train_epochs" in given else set()
        outdone |= {"eval_strategy"} if given.get("do_eval") is False else set()  # which would set it
        parser.set_defaults(**{name: value for name, value in demo.items() if name not in outdone})
    parser.set_defaults(**defaults)
    parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(argv)
    args = parsed[-2]
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: a folder is needed")
    if not args.do_train and not given.get("do_eval"):  # an eval_strategy sets do_eval by itself
        args.do_train, args.do_eval = "do_train" not in given, given.get("do_eval", True)
    set_seed(args.seed)
    return parsed


def _given(kinds: tuple[Any, ...], argv: list[str]) -> dict[str, Any]:
    """The flags that are given, however they are spelt, and their values."""
    parser = HfArgumentParser((*kinds, PCConfig))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0])


def flags(argv: list[str] | None) -> list[str]:
    """The flags of a command line, or of the .json or .yaml file that it names. Raises ValueError if that is none.

    Args:
        argv: None takes the command line's.
    """
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not argv[0].endswith((".json", ".yaml", ".yml")):
        return argv
    path = Path(argv[0])
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    text = path.read_text(encoding="utf-8")
    try:
        given = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no table of settings")
    found: list[str] = []
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            values = [",".join(map(str, values))] if name == "nodes" else values  # one flag takes several
            found += [f"--{name}", *map(str, values)]
    return found


def at_least(name: str, value: int | None, least: int) -> None:
    """Raise ValueError, naming the flag, if a number is too small; None is no number."""
    if value is not None and value < least:
        raise ValueError(f"--{name} {value} is too small: at least {least} is needed")


def first(data: Dataset, count: int | None) -> Dataset:
    """The first `count` rows, or all."""
    return data if count is None else data.select(range(min(count, len(data))))


def known_order(names: list[str], config: Any) -> list[str]:
    """The classes of a checkpoint in its order, where these are among them; else the names as they are."""
    known: dict[str, int] = config.label2id or {}
    return sorted(known, key=lambda name: int(known[name])) if set(names) <= set(known) else names


def class_labels(names: list[str]) -> dict[str, Any]:
    """The classes, as a configuration of transformers takes them."""
    return {"num_labels": len(names), "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)}}  # fmt: skip


def accuracy(found: EvalPrediction) -> dict[str, float]:
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}
