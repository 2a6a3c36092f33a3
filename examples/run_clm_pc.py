"""Train a causal language model by predictive coding, and by backprop from the same start.

    accelerate launch examples/run_clm_pc.py                              # a small GPT-2 on the Python reference
    accelerate launch examples/run_clm_pc.py --model_name_or_path M --train_file F --output_dir runs/mine
    accelerate launch examples/run_clm_pc.py settings.yaml

On several GPUs, or as two processes on the CPU (where `accelerate launch --cpu` would start one):

    accelerate launch --multi_gpu --num_processes 2 examples/run_clm_pc.py --use_cpu --train_file F
    torchrun --nproc_per_node 2 examples/run_clm_pc.py --use_cpu --train_file F

Takes the flags of transformers' run_clm.py that say what to train on and from what, every TrainingArguments field, and
every PCConfig field. With a model or a text of yours the settings of the demonstration (learning rate 4e-3, 400 steps,
an evaluation every 50) give way to those of TrainingArguments: say --learning_rate, --eval_strategy and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from clm_data import DataArguments, load_blocks, load_text, make_room, train_tokenizer
from task import DEMO, CommonArguments, TaskTrainingArguments, launch, parse
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
)

from hf_pc.comparison import run

#: where the settings of the demonstration differ from those of the others
CLM_DEMO: dict[str, Any] = DEMO | {
    "block_size": 128, "max_steps": 400, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
    "learning_rate": 4e-3, "adam_beta2": 0.95, "warmup_steps": 60,
}  # fmt: skip
DEMO_MODEL = "n_layer=4,n_embd=128,n_head=4,n_positions=128,initializer_range=0.06"
DEMO_MODEL += ",resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"


@dataclass
class ModelArguments(CommonArguments):
    model_type: str = field(default="gpt2", metadata={"help": "The type of a model trained from scratch."})
    config_name: str | None = field(default=None, metadata={"help": "A configuration to train from scratch."})
    config_overrides: str | None = field(default=None, metadata={"help": "n_embd=10,n_layer=2: changes to it."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the model's, else one is trained."})
    cache_dir: str | None = None
    model_revision: str = "main"
    token: str | None = field(default=None, metadata={"help": "For private repositories."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    dtype: str | None = field(default=None, metadata={"help": "auto, bfloat16, float16 or float32."})

    def __post_init__(self) -> None:
        allowed = (None, "auto", "bfloat16", "float16", "float32")
        if self.dtype not in allowed:
            raise ValueError(f"--dtype {self.dtype} is unknown; allowed: {', '.join(map(str, allowed[1:]))}")
        if self.model_name_or_path and (self.config_name or self.config_overrides):
            raise ValueError("--config_name and --config_overrides are for models trained from scratch, not with "
                             f"--model_name_or_path {self.model_name_or_path}")  # fmt: skip


def load_model_and_tokenizer(args: ModelArguments, data: Any) -> tuple[Any, Any]:
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token,
           "trust_remote_code": args.trust_remote_code}  # fmt: skip
    source = args.tokenizer_name or args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source, **hub) if source else train_tokenizer(data)
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype or "auto", **hub)
        return make_room(model, tokenizer), tokenizer
    if args.config_name:
        config = AutoConfig.from_pretrained(args.config_name, **hub)
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        raise ValueError(f"--model_type {args.model_type} is unknown to transformers")
    overrides = args.config_overrides
    if overrides is None and not args.config_name and args.model_type == "gpt2":
        overrides = DEMO_MODEL
    if overrides:
        config.update_from_string(overrides)
    config.vocab_size = len(tokenizer)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    if args.dtype and args.dtype != "auto":
        model = model.to(getattr(torch, args.dtype))
    return model, tokenizer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, pc_config = parse(
        (ModelArguments, DataArguments, TaskTrainingArguments), argv, CLM_DEMO, output_dir="runs/clm"
    )
    data = load_text(data_args, model_args.cache_dir, model_args.token)
    model, tokenizer = load_model_and_tokenizer(model_args, data)
    train, valid = load_blocks(data_args, data, model, tokenizer)
    options = {"train_dataset": train, "eval_dataset": valid, "data_collator": default_data_collator}
    results, _ = run(
        model, args, pc_config, options, compare_bp=model_args.compare_bp, processing_class=tokenizer,
        card={"base_model": model_args.model_name_or_path, "dataset": data_args.source,
              "dataset_id": data_args.dataset_name},
    )  # fmt: skip
    return results


if __name__ == "__main__":
    launch(main)
