"""Classify text by predictive coding, and by backprop from the same start.

    accelerate launch examples/run_classification_pc.py           # which package a docstring is from, a small BERT
    accelerate launch examples/run_classification_pc.py --model_name_or_path M --learning_rate 5e-5
    accelerate launch examples/run_classification_pc.py --train_file F --validation_file G

Takes every TrainingArguments and every PCConfig field.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate import PartialState
from compare import run
from text_task import TaskTrainingArguments, TextArguments, dataset_name, load, model_of, options, tokenizer_of
from transformers import HfArgumentParser, set_seed

from hf_pc import PCConfig


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser((TextArguments, TaskTrainingArguments, PCConfig))  # type: ignore[arg-type]
    args, training, pc_config = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    training.do_train = training.do_eval = True
    set_seed(training.seed)
    data = load(args)
    tokenizer = tokenizer_of(args, data)
    results, _ = run(
        model_of(args, data, tokenizer), training, pc_config, options(args, data, tokenizer),
        compare_bp=args.compare_bp, processing_class=tokenizer,
        card={"base_model": args.model_name_or_path, "dataset": dataset_name(args),
              "auto_class": "AutoModelForSequenceClassification"},
    )  # fmt: skip
    return results


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    PartialState().destroy_process_group()  # left to the interpreter's exit, it may abort it
