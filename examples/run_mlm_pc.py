"""Train a masked language model by predictive coding, and by backprop from the same start.

    accelerate launch examples/run_mlm_pc.py                             # a small BERT on the Python reference
    accelerate launch examples/run_mlm_pc.py --model_name_or_path M --train_file F --mlm_probability 0.2

Takes every TrainingArguments and every PCConfig field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from clm_data import DataArguments, load_blocks, load_text, make_room, train_tokenizer
from task import DEMO, SMALL_ENCODER, CommonArguments, TaskTrainingArguments, launch, parse
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    DataCollatorForLanguageModeling,
)

from hf_pc.architecture import positions
from hf_pc.comparison import run


@dataclass
class MLMArguments(CommonArguments):
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to mask."})

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability {self.mlm_probability} is not allowed: 0 to 1 is needed")


#: where the settings of the demonstration differ from those of the others
MLM_DEMO: dict[str, Any] = DEMO | {"learning_rate": 2e-3, "max_steps": 300, "eval_steps": 100, "max_eval_samples": 200}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, text, training, pc_config = parse(
        (MLMArguments, DataArguments, TaskTrainingArguments), argv, MLM_DEMO, output_dir="runs/mlm"
    )
    raw = load_text(text, None, None)
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = make_room(AutoModelForMaskedLM.from_pretrained(args.model_name_or_path), tokenizer)
    else:
        tokenizer = train_tokenizer(raw)
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SMALL_ENCODER)
        model = AutoModelForMaskedLM.from_config(config)
    if tokenizer.mask_token is None:
        raise ValueError(f"--model_name_or_path {args.model_name_or_path}: its tokenizer has no mask token")
    text = replace(text, block_size=text.block_size or min(64, positions(model) or 64))
    train, valid = (part.remove_columns("labels") for part in load_blocks(text, raw, model, tokenizer))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    options = {"train_dataset": train, "eval_dataset": valid, "data_collator": collator}
    results, _ = run(
        model, training, pc_config, options, compare_bp=args.compare_bp, processing_class=tokenizer,
        card={"base_model": args.model_name_or_path, "dataset": text.source,
              "dataset_id": text.dataset_name, "auto_class": "AutoModelForMaskedLM"},
    )  # fmt: skip
    return results


if __name__ == "__main__":
    launch(main)
