"""Fine-tune an adapter by predictive coding, and by backprop from the same start: only the adapter learns.

    accelerate launch examples/run_lora_pc.py --model_name_or_path M --learning_rate 1e-3 --lora_r 8
    accelerate launch examples/run_lora_pc.py --model_name_or_path M --use_dora true --train_file F

The task is run_classification_pc.py's. The adapter is saved as PEFT saves it and loads with plain PEFT.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState
from compare import run
from peft import LoraConfig, TaskType, get_peft_model
from text_task import TaskTrainingArguments, TextArguments, dataset_name, load, model_of, options, tokenizer_of
from transformers import HfArgumentParser, set_seed

from hf_pc import PCConfig


@dataclass
class LoraArguments:
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["query", "value"], metadata={"help": "Names of modules that get an adapter."}
    )
    use_dora: bool = False


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser((TextArguments, LoraArguments, TaskTrainingArguments, PCConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="runs/lora", learning_rate=2e-3)
    args, lora, training, pc_config = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    training.do_train = training.do_eval = True
    set_seed(training.seed)
    data = load(args)
    tokenizer = tokenizer_of(args, data)
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=lora.lora_r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules, use_dora=lora.use_dora,
    )  # fmt: skip
    model = get_peft_model(model_of(args, data, tokenizer), settings)
    results, _ = run(
        model, training, pc_config, options(args, data, tokenizer), compare_bp=args.compare_bp,
        processing_class=tokenizer,
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
