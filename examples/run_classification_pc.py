"""Classify text by predictive coding, and by backprop from the same start.

    accelerate launch examples/run_classification_pc.py           # which package a docstring is from, a small BERT
    accelerate launch examples/run_classification_pc.py --model_name_or_path M --learning_rate 5e-5
    accelerate launch examples/run_classification_pc.py --train_file F --validation_file G

Takes every TrainingArguments and every PCConfig field.
"""

from __future__ import annotations

from typing import Any

from task import TaskTrainingArguments, launch, parse
from text_task import TextArguments, train


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return train(*parse((TextArguments, TaskTrainingArguments), argv, output_dir="runs/classification"))


if __name__ == "__main__":
    launch(main)
