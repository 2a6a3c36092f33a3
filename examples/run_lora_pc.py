"""Fine-tune an adapter by predictive coding, and by backprop from the same start: only the adapter learns.

    accelerate launch examples/run_lora_pc.py --model_name_or_path M --learning_rate 1e-3 --lora_r 8
    accelerate launch examples/run_lora_pc.py --model_name_or_path M --use_dora true --train_file F

The task is run_classification_pc.py's. The adapter is saved as PEFT saves it and loads with plain PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, TaskType, get_peft_model
from task import DEMO, TaskTrainingArguments, at_least, launch, parse
from text_task import TextArguments, train


@dataclass
class LoraArguments:
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that get an adapter; default: PEFT's for the architecture."}
    )
    use_dora: bool = False

    def __post_init__(self) -> None:
        at_least("lora_r", self.lora_r, 1)
        at_least("lora_alpha", self.lora_alpha, 1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} is not allowed: 0 to 1 is needed")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args, lora, training, pc_config = parse(
        (TextArguments, LoraArguments, TaskTrainingArguments), argv, DEMO | {"learning_rate": 2e-3},
        output_dir="runs/lora",
    )  # fmt: skip
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=lora.lora_r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules, use_dora=lora.use_dora,
    )  # fmt: skip
    return train(args, training, pc_config, adapt=lambda model: get_peft_model(model, settings))


if __name__ == "__main__":
    launch(main)
