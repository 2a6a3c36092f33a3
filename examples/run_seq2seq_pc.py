"""Conditional language modelling by predictive coding: an encoder-decoder, against backprop from the same start.

    accelerate launch examples/run_seq2seq_pc.py        # signature to first docstring line, the standard library
    accelerate launch examples/run_seq2seq_pc.py --train_file pairs.jsonl --model_type bart

A file of pairs has the columns "source" and "target". Takes every Seq2SeqTrainingArguments and PCConfig field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from clm_data import END, DataArguments, check_columns
from datasets import Dataset, DatasetDict
from standard_library import functions
from task import DEMO, CommonArguments, TaskTrainingArguments, at_least, first, launch, parse
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
)

from hf_pc import PCSeq2SeqTrainer, PCSeq2SeqTrainingArguments
from hf_pc.comparison import run
from hf_pc.text import load_files
from hf_pc.trainer import BackpropSeq2SeqTrainer

#: small networks of each type, without dropout so that both sides see the same function
MODELS = {
    "t5": "d_model=128,d_kv=32,d_ff=512,num_layers=2,num_decoder_layers=2,num_heads=4,dropout_rate=0.0",
    "bart": "d_model=128,encoder_layers=2,decoder_layers=2,encoder_ffn_dim=512,decoder_ffn_dim=512,"
    "encoder_attention_heads=4,decoder_attention_heads=4,dropout=0.0,max_position_embeddings=256",
}


@dataclass
class Arguments(CommonArguments):
    model_type: str = field(default="t5", metadata={"help": "t5 or bart, for a model trained from scratch."})
    config_overrides: str | None = field(default=None, metadata={"help": "d_model=64,num_layers=1: changes to it."})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines with 'source' and 'target'."})
    max_source_length: int = 64
    max_target_length: int = 32
    max_train_samples: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODELS:
            raise ValueError(f"--model_type {self.model_type} is unknown; allowed: {', '.join(MODELS)}")
        if self.model_name_or_path and self.config_overrides:
            raise ValueError("--config_overrides is for models trained from scratch, not with --model_name_or_path")
        at_least("max_source_length", self.max_source_length, 1)
        at_least("max_target_length", self.max_target_length, 2)
        at_least("max_train_samples", self.max_train_samples, 1)
        DataArguments(train_file=self.train_file)  # complains of a file that cannot be read


@dataclass
class Seq2SeqExampleArguments(TaskTrainingArguments, PCSeq2SeqTrainingArguments):
    output_dir: str = field(default="runs/seq2seq", metadata={"help": "Where everything goes."})


#: where the settings of the demonstration differ from those of the others
SEQ2SEQ_DEMO: dict[str, Any] = DEMO | {
    "max_steps": 400, "per_device_eval_batch_size": 32, "learning_rate": 3e-3, "adam_beta2": 0.95, "warmup_steps": 40,
    "eval_steps": 100,
}  # fmt: skip


def load_pairs(args: Arguments) -> DatasetDict:
    """Splits "train" and "validation", columns "source" and "target"; every tenth pair validates."""
    if args.train_file:
        data = load_files(args.train_file)["train"]
        check_columns(f"--train_file {args.train_file}", data, ("source", "target"))
    else:
        pairs = sorted({(f"{found.module} {found.signature}", found.line) for found in functions()})
        data = Dataset.from_dict({"source": [p[0] for p in pairs], "target": [p[1] for p in pairs]})
    held_out = set(range(0, len(data), 10))
    return DatasetDict(
        train=data.select([i for i in range(len(data)) if i not in held_out]), validation=data.select(sorted(held_out))
    )


def load_tokenizer(args: Arguments, data: DatasetDict) -> Any:
    if args.model_name_or_path:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    bpe = ByteLevelBPETokenizer()
    texts = (text for row in data["train"] for text in (row["source"], row["target"]))
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, bos_token=END)


def build(args: Arguments, tokenizer: Any) -> Any:
    if args.model_name_or_path:
        return AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path)
    config = CONFIG_MAPPING[args.model_type]()
    config.update_from_string(MODELS[args.model_type])
    if args.config_overrides:
        config.update_from_string(args.config_overrides)
    config.vocab_size = len(tokenizer)
    config.pad_token_id = config.eos_token_id = config.decoder_start_token_id = tokenizer.eos_token_id
    config.bos_token_id = config.forced_eos_token_id = None
    return AutoModelForSeq2SeqLM.from_config(config)


def tokenize(data: DatasetDict, tokenizer: Any, args: Arguments) -> DatasetDict:
    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = [tokenizer.eos_token_id]
        inputs = tokenizer(rows["source"], truncation=True, max_length=args.max_source_length)
        targets = tokenizer(rows["target"], truncation=True, max_length=args.max_target_length - 1)["input_ids"]
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
                "labels": [ids if ids[-1:] == end else ids + end for ids in targets]}  # fmt: skip

    return data.map(encode, batched=True, remove_columns=data["train"].column_names, load_from_cache_file=False)


def show_examples(model: Any, tokenizer: Any, data: Any, longest: int, count: int = 4) -> None:
    model.eval()
    for row in first(data.select(range(0, len(data), max(1, len(data) // count))), count):
        read = tokenizer(row["source"], truncation=True, max_length=longest, return_tensors="pt")
        ids = read["input_ids"].to(model.device)
        with torch.no_grad():
            made = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
        print(f"{row['source']}\n    asked: {row['target']}\n    made:  {tokenizer.decode(made[0], True)}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    # cross-attention couples every decoder block to the encoder's errors: hence five sweeps
    args, training, pc_config = parse((Arguments, Seq2SeqExampleArguments), argv, SEQ2SEQ_DEMO, sweeps=5)
    pairs = load_pairs(args)
    pairs["train"] = first(pairs["train"], args.max_train_samples)
    tokenizer = load_tokenizer(args, pairs)
    model, data = build(args, tokenizer), tokenize(pairs, tokenizer, args)
    options = {
        "train_dataset": data["train"], "eval_dataset": data["validation"],
        "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    }  # fmt: skip
    results, trainer = run(
        model, training, pc_config, options, compare_bp=args.compare_bp, processing_class=tokenizer,
        trainers=(PCSeq2SeqTrainer, BackpropSeq2SeqTrainer),
        card={
            "base_model": args.model_name_or_path, "auto_class": "AutoModelForSeq2SeqLM",
            "dataset": Path(args.train_file).name if args.train_file else "the standard library's signatures",
        },
    )  # fmt: skip
    if trainer.is_world_process_zero():
        show_examples(model, tokenizer, pairs["validation"], args.max_source_length)
    return results


if __name__ == "__main__":
    launch(main)
