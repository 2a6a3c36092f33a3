"""Classify images by predictive coding, and by backprop from the same start.

    accelerate launch examples/run_image_classification_pc.py            # scikit-learn's digits, a small ViT
    accelerate launch examples/run_image_classification_pc.py --model_name_or_path M --train_dir FOLDER

A folder holds one folder of images per class. Takes every TrainingArguments and every PCConfig field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from task import DEMO, CommonArguments, TaskTrainingArguments, accuracy, class_labels, known_order, launch, parse
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
)

from hf_pc.comparison import run

#: a small ViT for images of 8 x 8
SMALL = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 64, "num_hidden_layers": 4,
         "num_attention_heads": 4, "intermediate_size": 128, "hidden_dropout_prob": 0.0}  # fmt: skip


@dataclass
class ImageArguments(CommonArguments):
    train_dir: str | None = field(default=None, metadata={"help": "A folder of images, one folder per class."})
    train_val_split: float = field(default=0.15, metadata={"help": "Share of the images to validate on."})

    def __post_init__(self) -> None:
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split {self.train_val_split} is not allowed: 0 to 1 is needed")
        if self.train_dir is not None and not Path(self.train_dir).is_dir():
            raise ValueError(f"--train_dir {self.train_dir}: there is no such folder")
        if (self.train_dir is None) != (self.model_name_or_path is None):
            raise ValueError(
                "--train_dir needs --model_name_or_path, and the reverse: a checkpoint says how to read images"
            )


def load(args: ImageArguments, seed: int) -> tuple[DatasetDict, list[str], Any]:
    """Splits "train" and "validation" of "pixel_values" and "labels", the names of classes, and what reads images."""
    processor = None
    if args.train_dir is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = (digits.images[:, None] / 8 - 1).astype(np.float32)
        data, names = Dataset.from_dict({"pixel_values": pixels, "labels": digits.target}), list(map(str, range(10)))
    else:
        raw = load_dataset("imagefolder", data_dir=args.train_dir, split="train")
        if "label" not in raw.features:
            raise ValueError(f"--train_dir {args.train_dir} holds no two folders of images, one for each class")
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
        folders = raw.features["label"].names
        names = known_order(folders, AutoConfig.from_pretrained(args.model_name_or_path))
        index = [names.index(folder) for folder in folders]

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in rows["image"]]
            labels = [index[label] for label in rows["label"]]
            return {"pixel_values": processor(images)["pixel_values"], "labels": labels}

        data = raw.map(encode, batched=True, remove_columns=raw.column_names, load_from_cache_file=False)
    split = data.train_test_split(args.train_val_split, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"]), names, processor


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, training, pc_config = parse(
        (ImageArguments, TaskTrainingArguments), argv,
        DEMO | {"learning_rate": 1e-3, "per_device_train_batch_size": 32}, output_dir="runs/images",
    )  # fmt: skip
    data, names, processor = load(args, training.seed)
    labels = class_labels(names)
    if args.model_name_or_path:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **labels)
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    else:
        model = AutoModelForImageClassification.from_config(ViTConfig(**SMALL, **labels))
    results, _ = run(
        model, training, pc_config,
        {"train_dataset": data["train"], "eval_dataset": data["validation"], "compute_metrics": accuracy},
        compare_bp=args.compare_bp, processing_class=processor,
        card={"base_model": args.model_name_or_path, "auto_class": "AutoModelForImageClassification",
              "dataset": Path(args.train_dir).name if args.train_dir else "scikit-learn's digits"},
    )  # fmt: skip
    return results


if __name__ == "__main__":
    launch(main)
