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

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clm_data import DataArguments, load_blocks, load_text, train_tokenizer
from task import CommonArguments, launch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)

from hf_pc import PCConfig, PCTrainingArguments
from hf_pc.comparison import run

#: where the defaults of the demonstration differ from those of TrainingArguments
DEMO: dict[str, Any] = {
    "do_train": True, "do_eval": True,
    "block_size": 128, "max_steps": 400, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
    "learning_rate": 4e-3, "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "warmup_steps": 60,
    "logging_steps": 10,
    "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "no", "use_cpu": not torch.cuda.is_available(),
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


@dataclass
class CLMTrainingArguments(PCTrainingArguments):
    output_dir: str = field(default="runs/clm", metadata={"help": "Where everything goes."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'true' for the last."}
    )


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, CLMTrainingArguments, PCConfig]:
    parser = HfArgumentParser((ModelArguments, DataArguments, CLMTrainingArguments, PCConfig))  # type: ignore[arg-type]
    own = ("model_name_or_path", "config_name", "train_file", "dataset_name")
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = flags_of(Path(argv[0]))
    names = {arg.lstrip("-").split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    if not names.intersection(own):
        parser.set_defaults(**DEMO)
    model_args, data_args, args, pc_config = parser.parse_args_into_dataclasses(argv)
    if not args.do_train and "do_eval" not in names:  # an eval_strategy sets do_eval by itself
        args.do_train, args.do_eval = "do_train" not in names, True
    return model_args, data_args, args, pc_config  # type: ignore[return-value]


def flags_of(path: Path) -> list[str]:
    """The flags that a .json or .yaml file of settings stands for. Raises ValueError if it is none."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    text = path.read_text(encoding="utf-8")
    try:
        given = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no table of settings")
    flags: list[str] = []
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def load_model_and_tokenizer(args: ModelArguments, data: Any) -> tuple[Any, Any]:
    hub = {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token,
           "trust_remote_code": args.trust_remote_code}  # fmt: skip
    source = args.tokenizer_name or args.model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(source, **hub) if source else train_tokenizer(data)
    if args.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=args.dtype or "auto", **hub
        ), tokenizer
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
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    if args.dtype and args.dtype != "auto":
        model = model.to(getattr(torch, args.dtype))
    return model, tokenizer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args, pc_config = parse(sys.argv[1:] if argv is None else argv)
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: a folder is needed")
    set_seed(args.seed)
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
