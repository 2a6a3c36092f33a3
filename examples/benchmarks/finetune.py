"""Fine-tune a pretrained encoder by predictive coding and by backprop: test accuracy of a text classification.

    python examples/benchmarks/finetune.py --model_name_or_path M --seeds 3

Prints one JSON line per method and seed, and one with mean and spread per method. The task is that of
run_classification_pc.py, with three rows of ten held out to test on; each method takes the learning rate, of the same
few, that has the lowest validation loss at seed 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import DatasetDict
from language import chosen
from options import positive
from regimes import methods
from text_task import TextArguments, load, model_of, options, tokenizer_of
from transformers import set_seed

from hf_pc import PCConfig, PCTrainer, PCTrainingArguments
from hf_pc.comparison import mean
from hf_pc.measurements import regime
from hf_pc.trainer import BackpropTrainer


def split(data: DatasetDict) -> DatasetDict:
    """Three rows of ten of the training text become "test"."""
    whole = data["train"]
    test = [i for i in range(len(whole)) if i % 10 < 3]
    kept = [i for i in range(len(whole)) if i % 10 >= 3]
    return DatasetDict(train=whole.select(kept), validation=data["validation"], test=whole.select(test))


def train(
    config: PCConfig | None, task: TextArguments, data: DatasetDict, args: argparse.Namespace, seed: int, rate: float
) -> dict[str, Any]:
    """Validation loss, test accuracy, and the regime of PC."""
    set_seed(seed)
    tokenizer = tokenizer_of(task, data)
    given = options(task, data, tokenizer)
    test = options(task, DatasetDict(train=data["train"], validation=data["test"]), tokenizer)["eval_dataset"]
    with tempfile.TemporaryDirectory() as folder:
        settings = PCTrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=rate,
            lr_scheduler_type="cosine", warmup_steps=args.steps // 10, logging_steps=10, save_strategy="no", seed=seed,
            report_to=[], use_cpu=not torch.cuda.is_available(), per_device_eval_batch_size=64,
        )  # fmt: skip
        model = model_of(task, data, tokenizer)
        trainer: Any = BackpropTrainer(model=model, args=settings, **given)
        if config is not None:
            trainer = PCTrainer(model=model, args=settings, pc_config=config, **given)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        found = {
            "validation_loss": loss if math.isfinite(loss) else math.inf,
            "test_accuracy": trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"],
        }
    if config is None:
        return found
    fraction, residual = (mean(trainer.state.log_history, name) for name in ("relaxed_fraction", "residual"))
    return found | {"relaxed_fraction": fraction, "residual": residual, "regime": regime(fraction, residual)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a pretrained encoder")
    parser.add_argument("--train_file", help="JSON lines or CSV with 'text' and 'label'; default: docstrings")
    for name, value in {"classes": 10, "steps": 200, "batch": 16, "sweeps": 3, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=positive, default=value)
    parser.add_argument("--methods", nargs="+", help="some of them; default: all")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4, 4e-4])
    args = parser.parse_args(argv)
    compared = chosen(methods(args.sweeps), args.methods)
    task = TextArguments(model_name_or_path=args.model_name_or_path, train_file=args.train_file, classes=args.classes)
    data = split(load(task))
    lines = []
    for name, config in compared.items():
        tried = {rate: train(config, task, data, args, 0, rate) for rate in args.learning_rates}
        best = min(tried, key=lambda rate: tried[rate]["validation_loss"])
        found = [tried[best]] + [train(config, task, data, args, seed, best) for seed in range(1, args.seeds)]
        for seed, facts in enumerate(found):
            print(json.dumps({"method": name, "seed": seed, "learning_rate": best, **facts}), flush=True)
        means = {key: statistics.fmean(facts[key] for facts in found) for key in found[0] if key != "regime"}
        lines.append({
            "method": name, **means, "spread": statistics.stdev(f["test_accuracy"] for f in found)
            if len(found) > 1 else None, "learning_rate": best, "rows": {n: len(rows) for n, rows in data.items()},
            "validation_loss_by_rate": {f"{r:g}": round(tried[r]["validation_loss"], 4) for r in tried},
            **({"regime": regime(means["relaxed_fraction"], means["residual"])} if config else {}),
        })  # fmt: skip
        print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
